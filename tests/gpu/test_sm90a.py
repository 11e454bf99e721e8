"""The Hopper backend against the reference in float64, over the table of cases, and repeatable bit for bit."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.linear import SVDQuantLinear
from engine.ops import backends, cuda, reference
from tests.ops.cases import CASES, DTYPES, Case, allowed_error, random_linear, tokens
from tests.ops.test_wgmma64 import random_nvfp4, without_minus_eight

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a device of compute capability 9.0"),
    pytest.mark.skipif(backends.cuda_kernels() is None, reason="the CUDA module was not built (no nvcc)"),
]
LARGE = (Case(512, 3072, 3072, 32), Case(4608, 3072, 12288, 32), Case(200, 2240, 2240, 64), Case(1000, 1001, 640, 16),
         Case(1031, 1000, 3072, 48), Case(1100, 384, 1536, 160), Case(1024, 256, 640, 0))  # fmt: skip


def on_device(linear: ops.CanonicalLinear) -> ops.CanonicalLinear:
    values = {field.name: getattr(linear, field.name) for field in fields(linear)}
    return ops.CanonicalLinear(**{n: v.cuda() if isinstance(v, Tensor) else v for n, v in values.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_close_to_the_reference(case: Case, dtype: torch.dtype):
    linear = on_device(without_minus_eight(random_linear(case)))
    packed = ops.pack(linear, "sm90a", dtype)
    x = tokens(case, dtype).cuda()
    act = ops.quantize_act(x, packed, "fp8")
    seen = x.to(torch.bfloat16)
    wanted = reference.quantize_act(seen, linear.smooth, linear.lora_down, "fp8", torch.float64)
    torch.testing.assert_close(act.scales, wanted.scales, rtol=2e-7, atol=0)
    # A quotient that is rounded the other way may move a code by one step of e4m3.
    steps = (act.codes.float() - wanted.codes.float()).abs() / wanted.codes.float().abs().clamp_min(2.0**-6)
    assert (steps <= 0.126).all()
    assert (steps > 0).float().mean() < 1e-4
    y = ops.linear(act, packed, dtype)
    exact = reference.linear(act, linear, torch.float64)
    error = (y.double() - exact).abs()
    # The matrix units keep 13 bits below the largest term of each sum of 32.
    allowed = allowed_error(act, linear, exact, dtype) + magnitudes(act, linear) * 2.0**-12 + exact.abs() * 2.0**-8
    if case.m >= cuda.WIDE_FROM:  # weights rounded to four significant bits: half a step each, at random
        assert error.square().mean().sqrt() <= 0.04 * exact.square().mean().sqrt()
        allowed = allowed + magnitudes(act, linear) * 2.0**-4
    assert (error <= allowed).all(), f"worst is {(error / allowed).max():.2f} times the allowed error"
    assert torch.equal(ops.svdq_linear(x, packed, "fp8").view(y.shape), y)


def magnitudes(act: reference.QuantizedAct, linear: ops.CanonicalLinear) -> Tensor:
    terms = (act.codes.double().abs() * act.scales.double()[:, None]) @ ops.dequantize(linear, torch.float64).abs().T
    if linear.lora_up is not None:
        terms = terms + act.low_rank.double().abs() @ linear.lora_up.double().abs().T
    return terms


# Either side of a stage's 64 ranks, a LoRA's beside the branch's own, and tokens that fill no tile.
BRANCHES = (0, 16, 32, 48, 80, 160)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", BRANCHES)
@pytest.mark.parametrize("tile", [128, 192, 224, 256])
def test_the_branch_in_a_widened_product(tile: int, rank: int, dtype: torch.dtype):
    """The branch alone, beside weights of zero, to 16-bit rounding; tokens of zeros have their bias alone."""
    case = Case(1027, 200, 384, rank)
    layer = without_minus_eight(random_linear(case))
    layer.codes.zero_()
    linear, x = on_device(layer), tokens(case, dtype).cuda()
    x[5:9] = 0
    packed = ops.pack(linear, "sm90a", dtype)
    act = cuda._quantize(x, [(packed.blob, packed.spec)])[0]
    wide = cuda._widen(act, packed.blob, packed.spec)
    y = cuda._multiply(act, wide, packed.blob, packed.spec, torch.float32, tile=tile)
    terms, exact = linear.bias.double().abs().expand(case.m, -1), linear.bias.double().expand(case.m, -1)
    if rank:
        exact = exact + act.low_rank.double() @ linear.lora_up.double().T
        terms = terms + act.low_rank.double().abs() @ linear.lora_up.double().abs().T
    assert ((y - exact).abs() <= terms * 2.0**-7).all()
    assert (y - exact).norm() <= 2.0**-8 * exact.norm()
    assert torch.equal(y[5:9], linear.bias.float().expand(4, -1))
    assert torch.equal(y, cuda._multiply(act, wide, packed.blob, packed.spec, torch.float32, tile=tile))


def test_rows_of_zeros_keep_their_branch():
    case = Case(1100, 256, 256, 32)
    layer = without_minus_eight(random_linear(case))
    layer.wscales[3:70] = 0
    linear = on_device(layer)
    packed = ops.pack(linear, "sm90a")
    act = ops.quantize_act(tokens(case, torch.bfloat16).cuda(), packed, "fp8")
    y, exact = ops.linear(act, packed, torch.float32), reference.linear(act, linear, torch.float64)
    assert (y - exact)[:, 3:70].norm() <= 2.0**-8 * exact[:, 3:70].norm()
    assert (y - exact).norm() <= 0.04 * exact.norm()


RESIDENT = (Case(1027, 128, 12288, 32), Case(2300, 128, 3072, 32), Case(4608, 128, 3072, 16), Case(100, 128, 320, 32),
            Case(4608, 128, 12288, 32), Case(3, 128, 6144, 16), Case(600, 128, 12288, 0))  # fmt: skip


@pytest.mark.parametrize("form", [2, 3])
@pytest.mark.parametrize("case", RESIDENT, ids=str)
def test_forms_of_quantization_agree(case: Case, form: int):
    """Every form gives the codes and scales of the first, and projections that differ in the sums' order."""
    linear, x = on_device(without_minus_eight(random_linear(case))), tokens(case, torch.bfloat16).cuda()
    x[1] = 0
    packed = ops.pack(linear, "sm90a")
    target = [(packed.blob, packed.spec)]
    (plain,), (other,), (again,) = (cuda._quantize(x, target, form=some) for some in (1, form, form))
    wanted = reference.quantize_act(x, linear.smooth, linear.lora_down, "fp8", torch.float64)
    for one, two in ((plain, other), (other, again)):
        assert torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8))
        assert torch.equal(one.scales, two.scales)
    assert torch.equal(other.low_rank, again.low_rank)
    assert (other.low_rank - wanted.low_rank).norm() <= 2.0**-8 * wanted.low_rank.norm()
    # A token's bits do not depend on the tokens beside it.
    some = cuda._quantize(x[: case.m // 2 + 1], target, form=form)[0]
    assert torch.equal(some.low_rank, other.low_rank[: case.m // 2 + 1])


@pytest.mark.parametrize("shape", [(1, 1100), (2, 1024), (4, 512), (1, 300), (3, 128)], ids=str)
@pytest.mark.parametrize("n", [200, 384])
def test_a_product_is_added_to_a_stream(shape: tuple[int, int], n: int):
    """x += gate * y, to the bit: the gated product is rounded, then the sum."""
    (batch, length), case = shape, Case(shape[0] * shape[1], n, 320, 32)
    packed = ops.pack(on_device(without_minus_eight(random_linear(case))), "sm90a")
    y = tokens(case, torch.bfloat16).cuda().view(batch, length, -1)
    draw = torch.Generator("cuda").manual_seed(1)
    x, gate = (torch.randn(*size, n, device="cuda", generator=draw).bfloat16() for size in (shape, (batch,)))
    product = ops.linear(ops.quantize_act(y, packed, "fp8"), packed, torch.float32).view(batch, length, n)
    wanted = x + (gate[:, None].float() * product).bfloat16()
    assert ops.adds_at_once(x, gate, packed)
    got = x.clone()
    ops.add_linear_(got, gate, y, packed, "fp8")
    assert torch.equal(got, wanted)


def test_weights_that_are_kept_in_8_bits():
    """The same bits for many tokens, an 8-bit rounding's difference for few, and so with another branch."""
    case = Case(1100, 384, 320, 32)
    base, x = without_minus_eight(random_linear(case)), tokens(case, torch.bfloat16).cuda()
    plain, kept = (SVDQuantLinear(on_device(base), backend="sm90a", activation="w4a8", dtype=torch.bfloat16)
                   for _ in range(2))  # fmt: skip
    kept.keep_wide(True)
    assert kept.packed_wide.numel() == 384 * 384 + 384 * 128  # inputs come in steps of 128
    for _ in range(2):
        assert torch.equal(kept(x), plain(x))
        few, wanted = kept(x[:300]), plain(x[:300])
        assert 0 < (few - wanted).norm() < 0.05 * wanted.norm()
        draw = torch.Generator("cuda").manual_seed(4)
        down, up = (0.05 * torch.randn(*size, generator=draw, device="cuda") for size in ((16, 320), (384, 16)))
        for layer in (plain, kept):
            layer.extend_branch(down, up, None)
    kept.keep_wide(False)
    assert kept.packed_wide is None
    assert torch.equal(kept(x[:300]), plain(x[:300]))


def test_the_same_bits_again():
    linear = on_device(without_minus_eight(random_linear(Case(300, 400, 1536, 32))))
    packed, x = ops.pack(linear, "sm90a"), tokens(Case(300, 400, 1536, 32), torch.bfloat16).cuda()
    first = ops.svdq_linear(x, packed, "fp8")
    assert all(torch.equal(first, ops.svdq_linear(x, packed, "fp8")) for _ in range(20))


def test_packing_on_the_device_gives_the_same_bytes():
    linear = without_minus_eight(random_linear(Case(1, 200, 320, 32)))
    assert torch.equal(ops.pack(on_device(linear), "sm90a").blob.cpu(), ops.pack(linear, "sm90a").blob)


@pytest.mark.parametrize("m", [96, 1500])
def test_gelu_is_applied_before_rounding(m: int):
    case = Case(m, 512, 1536, 32)
    packed = ops.pack(on_device(without_minus_eight(random_linear(case))), "sm90a")
    x = tokens(case, torch.bfloat16).cuda()
    act = ops.quantize_act(x, packed, "fp8")
    wanted = torch.nn.functional.gelu(ops.linear(act, packed, torch.float32), approximate="tanh")
    torch.testing.assert_close(ops.svdq_linear(x, packed, "fp8", gelu=True).float(), wanted, rtol=2**-8, atol=2e-3)


# One wave of whole rows and several, tokens that fill no CTA, samples that begin within one, ranks that only the first
# form serves.
ROWS = ((1, 4608, 3072, (32, 32)), (1, 1536, 3072, (32,)), (3, 1001, 3072, (16, 32)), (2, 37, 3072, (0, 32)),
        (1, 300, 3072, (32, 48)), (5, 23, 320, (32, 16)), (1, 3, 1536, (32,)), (1, 5000, 3072, (0, 0)),
        (9, 5, 3072, (48,)), (2, 2500, 3072, (32, 32)))  # fmt: skip


@pytest.mark.parametrize(("samples", "length", "k", "ranks"), ROWS)
def test_forms_behind_a_norm_agree(samples: int, length: int, k: int, ranks: tuple[int, ...]):
    linears = [on_device(without_minus_eight(random_linear(Case(1, 256, k, rank), seed=rank + i)))
               for i, rank in enumerate(ranks)]  # fmt: skip
    draw = torch.Generator("cuda").manual_seed(7)
    x = (torch.randn(samples, length, k, generator=draw, device="cuda") * 3 + 1).bfloat16()
    x[0, 1] = 0
    shift, scale, _ = (torch.randn(samples, 3 * k, generator=draw, device="cuda").bfloat16() * 0.5).chunk(3, dim=1)
    targets = [(packed.blob, packed.spec) for packed in (ops.pack(linear, "sm90a") for linear in linears)]
    plain, rows, again = (cuda._quantize(x, targets, (scale, shift, 1e-6), form=form) for form in (1, 3, 3))
    fewer = cuda._quantize(x[:, : length // 2 + 1].contiguous(), targets, (scale, shift, 1e-6), form=3)
    exact = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6) * (1 + scale.double()[:, None])
    seen = (exact + shift.double()[:, None]).bfloat16().flatten(0, 1)
    for i, linear in enumerate(linears):
        for one, two in ((plain[i], rows[i]), (rows[i], again[i])):
            assert torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8))
            assert torch.equal(one.scales, two.scales)
        assert torch.equal(rows[i].low_rank, again[i].low_rank)
        wanted = reference.quantize_act(seen, linear.smooth, linear.lora_down, "fp8", torch.float64).low_rank
        assert (rows[i].low_rank - wanted).norm() <= 2.0**-8 * wanted.norm()
        assert (rows[i].low_rank - plain[i].low_rank).double().norm() <= 2.0**-9 * wanted.norm()
        # A token's bits do not depend on the tokens beside it.
        if max(ranks) <= 32:
            kept = rows[i].low_rank.unflatten(0, (samples, length))[:, : length // 2 + 1]
            assert torch.equal(fewer[i].low_rank, kept.flatten(0, 1))


NORMED = ((1, 300, 3072, (32, 48)), (2, 100, 1536, (32,)), (1, 4608, 3072, (32, 32)), (3, 7, 320, (16, 128)))


@pytest.mark.parametrize(("samples", "length", "k", "ranks"), NORMED)
def test_norm_and_two_layers_in_one_pass(samples: int, length: int, k: int, ranks: tuple[int, ...]):
    linears = [on_device(without_minus_eight(random_linear(Case(1, 256, k, rank), seed=rank + i)))
               for i, rank in enumerate(ranks)]  # fmt: skip
    draw = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(samples, length, k, generator=draw, device="cuda") * 3 + 1
    modulation = torch.randn(samples, 3 * k, generator=draw, device="cuda").bfloat16() * 0.5
    x, (shift, scale, _) = x.bfloat16(), modulation.chunk(3, dim=1)
    packs = [ops.pack(linear, "sm90a") for linear in linears]
    acts = ops.norm_quantize(x, scale, shift, 1e-6, packs, "fp8")
    exact = torch.nn.functional.layer_norm(x.double(), (k,), eps=1e-6) * (1 + scale.double()[:, None])
    seen = (exact + shift.double()[:, None]).bfloat16().flatten(0, 1)
    for act, linear in zip(acts, linears, strict=True):
        wanted = reference.quantize_act(seen, linear.smooth, linear.lora_down, "fp8", torch.float64)
        torch.testing.assert_close(act.scales, wanted.scales, rtol=2**-8, atol=0)
        # A value rounded the other way to 16 bits moves a code by a step at most.
        steps = (act.codes.float() - wanted.codes.float()).abs() / wanted.codes.float().abs().clamp_min(2.0**-6)
        assert (steps <= 0.126).all()
        same = act.scales == wanted.scales
        assert (steps[same] > 0).float().mean() < 0.01
        torch.testing.assert_close(act.low_rank.float(), wanted.low_rank.float(), rtol=2**-6, atol=0.02)
    again = ops.norm_quantize(x, scale, shift, 1e-6, packs, "fp8")
    for one, two in zip(acts, again, strict=True):
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("length", "words", "heads"), [(300, 0, 24), (256, 77, 24), (9, 4, 3)])
def test_heads_are_rotated_as_in_torch(length: int, words: int, heads: int):
    draw = torch.Generator("cuda").manual_seed(5)
    made = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")  # noqa: E731
    qkv = made(2, length, 3 * heads * 128).bfloat16()
    text = made(2, words, 3 * heads * 128).bfloat16() if words else None
    norms, angles = [made(128).bfloat16() for _ in range(4 if words else 2)], made(words + length, 64)
    rotary = [part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin())]
    got = ops.rotate_heads(qkv, text, norms, *rotary, 1e-6)
    exactly = [part if part is None else part.double().cpu() for part in (qkv, text, *norms, *rotary)]
    exact = ops.rotate_heads(exactly[0], exactly[1], exactly[2:-2], *exactly[-2:], 1e-6)
    for one, wanted in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double().cpu(), wanted.double(), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize(
    ("batch", "words", "length", "heads"), [(1, 77, 1100, 3), (1, 512, 4096, 24), (1, 0, 300, 2), (3, 0, 400, 3)]
)
def test_heads_are_rotated_where_they_are_projected(batch: int, words: int, length: int, heads: int):
    """The bits of a projection and the pass behind it."""
    draw = torch.Generator("cuda").manual_seed(6)
    sizes = [size for size in (words, length) if size]
    cases = [Case(batch * size, 3 * heads * 128, 320, 32) for size in sizes]
    layers = [ops.pack(on_device(without_minus_eight(random_linear(case))), "sm90a") for case in cases]
    acts = [cuda._quantize(tokens(case, torch.bfloat16).cuda(), [(layer.blob, layer.spec)])[0]
            for case, layer in zip(cases, layers, strict=True)]  # fmt: skip
    norms = [torch.randn(128, generator=draw, device="cuda").bfloat16() for _ in range(2 * len(sizes))]
    angles = torch.randn(sum(sizes), 64, generator=draw, device="cuda")
    rotary = [part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin())]
    assert ops.projects_heads(layers, rotary[0], torch.bfloat16, batch)
    got = ops.project_heads(acts, layers, norms, *rotary, 1e-6, batch)
    *text, picture = (ops.linear(act, layer, torch.bfloat16).unflatten(0, (batch, -1))
                      for act, layer in zip(acts, layers, strict=True))  # fmt: skip
    wanted = ops.rotate_heads(picture, text[0] if text else None, norms, *rotary, 1e-6)
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))


def test_a_lora_beside_the_norm():
    """Extended branches, as LoRAs leave them, give the same behind a fused norm and behind a plain one."""
    base = without_minus_eight(random_linear(Case(1, 256, 1536, 32)))
    layer = SVDQuantLinear(on_device(base), backend="sm90a", activation="w4a8", dtype=torch.bfloat16)
    draw = torch.Generator("cuda").manual_seed(4)
    made = lambda *shape: torch.randn(*shape, generator=draw, device="cuda").bfloat16()  # noqa: E731
    layer.extend_branch(made(16, 1536) * 0.02, made(256, 16) * 0.1, torch.full((48,), 0.7, device="cuda"))
    x, scale, shift = made(1, 1200, 1536), made(1, 1536), made(1, 1536)
    (act,) = ops.norm_quantize(x, scale, shift, 1e-6, [layer.packed], layer.mode)
    normed = torch.nn.functional.layer_norm(x.float(), (1536,), eps=1e-6) * (1 + scale.float()) + shift.float()
    got, wanted = layer.multiply(act, torch.bfloat16).float(), layer(normed.bfloat16())[0].float()
    assert (got - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("sizes", [(5, 24, 128, 16), (300, 200, 320, 32), (1500, 3072, 3072, 32)])
def test_nvfp4_is_close_to_the_reference(sizes: tuple[int, int, int, int], factors: bool):
    m, n, k, rank = sizes
    linear = on_device(random_nvfp4(n, k, rank, factors))
    packed = ops.pack(linear, "sm90a")
    x = tokens(Case(m, n, k, rank), torch.bfloat16).cuda()
    act = ops.quantize_act(x, packed, "fp8")
    y, exact = ops.linear(act, packed, torch.float32), reference.linear(act, linear, torch.float64)
    assert (y - exact).norm() <= 0.04 * exact.norm()
    assert torch.equal(y, ops.linear(act, packed, torch.float32))
