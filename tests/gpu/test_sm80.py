"""The kernels for Ampere and later against the reference in float64: the table of cases, and the CPU's codes."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F

from engine import ops
from engine.errors import ArgumentError, BackendError
from engine.linear import SVDQuantLinear
from engine.ops import backends, reference, self_check, sm80
from tests.gpu.test_sm90a import on_device
from tests.ops.cases import (
    CASES,
    DTYPES,
    EPSILON,
    STRIDES,
    Case,
    allowed_error,
    check_a_bad_token,
    expected,
    random_awq,
    random_linear,
    tokens,
)
from tests.ops.test_panel16 import unpaired

RUNS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS, reason="needs a device of compute capability 8.0 or more"),
    pytest.mark.skipif(backends.cuda_kernels() is None, reason="the CUDA module was not built (no nvcc)"),
]
LARGE = (Case(512, 3072, 3072, 32), Case(200, 2240, 2240, 64), Case(1000, 1001, 640, 16), Case(129, 129, 192, 0))
AWQ_CASES = (Case(1, 18432, 3072, 0), Case(2, 33, 128, 0), Case(5, 7, 3072, 0), Case(67, 48, 192, 0))


def awq_on_device(weight: ops.AwqWeight) -> ops.AwqWeight:
    assert weight.bias is not None
    return ops.AwqWeight(weight.codes.cuda(), weight.scales.cuda(), weight.zeros.cuda(), weight.bias.cuda())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_codes_are_equal_and_results_close(case: Case, dtype: torch.dtype):
    weight, x = random_linear(case, dtype), tokens(case, dtype)
    packed, there = ops.pack(on_device(weight), "sm80", dtype), on_device(weight)
    for mode in backends.modes("sm80"):
        wanted_act, _ = expected(x, weight, mode)
        act = ops.quantize_act(x.cuda(), packed, mode)
        assert torch.equal(act.codes.cpu(), wanted_act.codes)
        assert torch.equal(act.scales.cpu(), wanted_act.scales)
        torch.testing.assert_close(act.low_rank.double().cpu(), wanted_act.low_rank, rtol=1e-5, atol=4e-5)
        y = ops.linear(act, packed, dtype)
        exact = reference.linear(act, there, torch.float64)
        allowed = allowed_error(reference.QuantizedAct(*act), there, exact, dtype)
        error = (y.double() - exact).abs()
        assert (error <= allowed).all(), f"{mode}: worst is {(error / allowed).max():.2f} times the allowed error"
        assert torch.equal(ops.svdq_linear(x.cuda(), packed, mode).view(y.shape), y)
        if mode == "int8":
            continue
        pairs = ops.quantize_act(x.cuda(), packed, mode, pairs=True)
        assert torch.equal(unpaired(pairs.codes.cpu(), mode), wanted_act.codes)
        assert all(torch.equal(mine, other) for mine, other in zip(pairs[1:], act[1:], strict=True))
        assert torch.equal(ops.linear(pairs, packed, dtype), y)
        for form in (1, 2):  # through INT8 and INT4 units
            got = torch.full_like(y, torch.nan)
            sm80._multiply(pairs, packed.blob, packed.spec, got, form=form)
            assert torch.equal(got, y), f"{mode}: form {form} has other bits"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_give_the_same_bits(strides: str, dtype: torch.dtype):
    case = Case(19, 40, 256, 16)
    packed = ops.pack(on_device(random_linear(case, dtype)), "sm80", dtype)
    x = tokens(case, dtype, strides)
    there = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda").copy_(x)
    y = ops.svdq_linear(there, packed, "int4")
    assert torch.equal(y, ops.svdq_linear(x.cuda().contiguous(), packed, "int4"))
    assert not y.isnan().any()


@pytest.mark.parametrize("mode", ["int4", "uint4"])
@pytest.mark.parametrize("top", [False, True])
def test_the_largest_codes(top: bool, mode: str):
    """Dots of the largest magnitude: all weights -8 or 7, all tokens at an end of their range."""
    case = Case(20, 40, 256, 0)
    base = random_linear(case, smooth=False)
    weight = ops.CanonicalLinear(torch.full_like(base.codes, 0x77 if top else 0x88), base.wscales)
    packed = ops.pack(on_device(weight), "sm80")
    for value in (1.0, -1.0):
        x = torch.full((case.m, case.k), value).bfloat16()
        _, wanted = expected(x, weight, mode)
        for form in (1, 2):
            y = torch.empty(case.m, case.n, device="cuda")
            pairs = ops.quantize_act(x.cuda(), packed, mode, pairs=True)
            sm80._multiply(pairs, packed.blob, packed.spec, y, form=form)
            torch.testing.assert_close(y.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", backends.modes("sm80"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(130, 72, 192, 16), Case(70, 33, 320, 0), Case(600, 1024, 256, 32)], ids=str)
def test_gelu_where_the_product_is_stored(case: Case, dtype: torch.dtype, mode: str):
    packed = ops.pack(on_device(random_linear(case, dtype)), "sm80", dtype)
    x = tokens(case, dtype).cuda()
    got, wanted = ops.svdq_linear(x, packed, mode, gelu=True), ops.svdq_linear(x, packed, mode)
    wanted = F.gelu(wanted, approximate="tanh")
    if dtype == torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, wanted)
    act = ops.quantize_act(x, packed, mode)
    assert torch.equal(ops.linear(act, packed, dtype, gelu=True), got)


@pytest.mark.parametrize("mode", backends.modes("sm80"))
@pytest.mark.parametrize("sizes", [(1, 300, 200), (2, 70, 256), (3, 129, 72), (1, 1, 8)])
def test_a_gated_product_is_added_where_it_is_stored(sizes: tuple[int, ...], mode: str):
    batch, length, n = sizes
    case = Case(batch * length, n, 320, 32)
    packed = ops.pack(on_device(random_linear(case)), "sm80")
    y = tokens(case, torch.bfloat16).cuda().view(batch, length, -1)
    draw = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(batch, length, n, generator=draw, device="cuda").bfloat16()
    gate = torch.randn(batch, 3 * n, generator=draw, device="cuda").bfloat16()[:, n : 2 * n]  # rows of a modulation
    assert ops.adds_at_once(x, gate, packed)
    wanted = ops.gated_add(x, gate, ops.svdq_linear(y, packed, mode))
    got = x.clone()
    ops.add_linear_(got, gate, y, packed, mode)
    assert torch.equal(got, wanted)
    assert not ops.adds_at_once(x.half(), gate.half(), packed)


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_layer_with_a_scaled_branch_reads_pairs(unsigned: bool):
    case = Case(40, 96, 256, 32)
    layer = SVDQuantLinear(
        on_device(random_linear(case)), backend="sm80", activation="w4a4", dtype=torch.bfloat16, unsigned_input=unsigned
    )
    x = tokens(case, torch.bfloat16).cuda()
    plain = layer(x)
    layer.branch_scale = torch.ones(32, device="cuda")
    assert torch.equal(layer(x), plain)


def test_pairs_of_another_size_are_refused():
    packed = ops.pack(on_device(random_linear(Case(3, 24, 128, 0))), "sm80")
    act = ops.quantize_act(torch.randn(3, 128, device="cuda"), packed, "int4", pairs=True)
    assert act.codes.shape == (3, 64)
    with pytest.raises(ArgumentError, match=r"act\.codes: expected shape"):
        ops.linear(act._replace(codes=act.codes[:, :32]), packed, torch.float32)


def test_the_self_check_passes_and_is_short():
    device = torch.device("cuda", torch.cuda.current_device())
    assert self_check.failure(device, "sm80") == ""
    start = time.perf_counter()
    assert self_check.failure(device, "sm80") == ""
    assert time.perf_counter() - start < 0.5


def test_the_self_check_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch):
    device, right = torch.device("cuda", torch.cuda.current_device()), sm80._multiply

    def wrong(act: reference.QuantizedAct, blob: torch.Tensor, spec: ops.PackedLinear, y: torch.Tensor, **rest: object):
        right(act, blob, spec, y, **rest)
        y[..., 3] = 0

    monkeypatch.setattr(sm80, "_multiply", wrong)
    assert self_check.failure(device, "sm80") == "its self-check gave wrong results (int8, int4, uint4)"


def test_no_self_check_while_a_graph_is_recorded():
    backends._check_sm80.cache_clear()
    x = torch.zeros(8, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        with pytest.raises(BackendError, match="before a CUDA graph is recorded"):
            backends.objection("sm80", torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_its_own_row_only(bad: float):
    case = Case(17, 32, 128, 0)
    packed, x = ops.pack(on_device(random_linear(case)), "sm80"), tokens(case, torch.bfloat16).cuda()
    check_a_bad_token(packed, x, bad)


def test_no_tokens():
    packed = ops.pack(on_device(random_linear(Case(3, 24, 64, 16))), "sm80")
    assert ops.svdq_linear(torch.empty(2, 0, 64, device="cuda"), packed, "int8").shape == (2, 0, 24)


@pytest.mark.parametrize("mode", ["int8", "int4", "uint4"])
def test_the_same_bits_again(mode: str):
    case = Case(300, 400, 1536, 32)
    packed, x = ops.pack(on_device(random_linear(case)), "sm80"), tokens(case, torch.bfloat16).cuda()
    first = ops.svdq_linear(x, packed, mode)
    assert all(torch.equal(first, ops.svdq_linear(x, packed, mode)) for _ in range(20))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", AWQ_CASES, ids=str)
def test_weight_only_is_close(case: Case, dtype: torch.dtype):
    weight, x = awq_on_device(random_awq(case, dtype)), tokens(case, dtype).cuda()
    packed = ops.pack_awq(weight, "sm80", dtype)
    assert packed.backend == "sm80"
    y, wanted = ops.awq_linear(x, packed), reference.awq_linear(x, weight, torch.float64)
    magnitudes = ops.AwqWeight(weight.codes, weight.scales.abs(), weight.zeros.abs(), None)
    terms = reference.awq_linear(x.abs(), magnitudes, torch.float64)
    error, allowed = (y.double() - wanted).abs(), wanted.abs() * EPSILON[dtype] + terms * 2.0**-19
    assert (error <= allowed).all(), f"worst is {(error / allowed).max():.2f} times the allowed error"
    assert torch.equal(y, ops.awq_linear(x, packed))


def test_weight_only_for_many_tokens():
    case = Case(512, 1024, 256, 0)
    weight, x = awq_on_device(random_awq(case)), tokens(case, torch.bfloat16).cuda()
    y, wanted = ops.awq_linear(x, ops.pack_awq(weight, "sm80")), reference.awq_linear(x, weight, torch.float64)
    assert (y.double() - wanted).norm() <= 2**-7 * wanted.norm()
    assert torch.equal(y, ops.awq_linear(x, ops.pack_awq(weight, "sm80")))


def test_packing_on_the_device_gives_the_same_bytes():
    linear, awq = random_linear(Case(1, 200, 320, 32)), random_awq(Case(1, 200, 320, 0))
    assert torch.equal(ops.pack(on_device(linear), "sm80").blob.cpu(), ops.pack(linear, "sm80").blob)
    assert torch.equal(ops.pack_awq(awq_on_device(awq), "sm80").blob.cpu(), ops.pack_awq(awq, "sm80").blob)
