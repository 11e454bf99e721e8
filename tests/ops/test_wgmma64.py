"""Hopper's tiling, without a Hopper: what a thread's masks and turns show must be the codes it is to multiply."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.errors import ArgumentError
from engine.linear import SVDQuantLinear
from engine.ops import wgmma64
from tests.ops.cases import CASES, Case, check_nvfp4_comes_back, random_linear


def without_minus_eight(linear: ops.CanonicalLinear) -> ops.CanonicalLinear:
    low, high = linear.codes & 15, linear.codes >> 4
    codes = torch.where(low == 8, 9, low) | (torch.where(high == 8, 9, high) << 4)
    return ops.CanonicalLinear(**vars(linear) | {"codes": codes.to(torch.uint8)})


def as_e4m3(register: int) -> list[float]:
    return torch.tensor([(register >> (8 * b)) & 255 for b in range(4)], dtype=torch.uint8).view(
        torch.float8_e4m3fn
    ).float().tolist()  # fmt: skip


def seen_by_threads(tiles: Tensor) -> Tensor:
    """What wgmma reads: fragments of m64k32 in e4m3, as the PTX manual lays them out, over all blocks."""
    rows, columns = tiles.shape[:2]
    out = torch.zeros(rows * 64, columns * 64)
    words = tiles.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    for block in torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).tolist():
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            for index, word in enumerate(words[block[0], block[1], thread].tolist()):
                row = block[0] * 64 + 16 * warp + lane // 4 + 8 * (index % 2)
                column = block[1] * 64 + 16 * (index // 2) + 4 * (lane % 4)
                turned = (word >> 4 | word << 28) & 0xFFFFFFFF
                for step, register in enumerate((word & 0x87878787, turned & 0x87878787)):
                    first = column + 32 * step
                    out[row, first : first + 4] = torch.tensor(as_e4m3(register))
    return out * 512


def test_threads_see_the_codes():
    nibbles = torch.randint(0, 16, (70, 192), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    nibbles[nibbles == 8] = 9
    wanted = torch.zeros(128, 256)
    wanted[:70, :192] = ((nibbles ^ 8).to(torch.int8) - 8).float()
    assert torch.equal(seen_by_threads(wgmma64.tile_codes(nibbles)), wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packs_and_comes_back(case: Case):
    linear = without_minus_eight(random_linear(case))
    packed = ops.pack(linear, "sm90a")
    assert packed.backend == "sm90a"
    back = ops.unpack(packed)
    for name, value in vars(linear).items():
        other = getattr(back, name)
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value, other), name


def random_nvfp4(n: int, k: int, rank: int = 16, factors: bool = True) -> ops.CanonicalLinear:
    """Codes of every kind, -0 too; scales of about a trained layer's spread."""
    draw = torch.Generator().manual_seed(n + k)
    like = random_linear(Case(1, n, k, rank))
    return ops.CanonicalLinear(
        codes=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw),
        wscales=(torch.rand(n, k // 16, generator=draw) * 300 + 20).to(torch.float8_e4m3fn),
        smooth=like.smooth, lora_down=like.lora_down, lora_up=like.lora_up, bias=like.bias,
        wtscale=torch.tensor([2e-5]) if factors else None,
        wcscales=(torch.rand(n, generator=draw) + 0.5).bfloat16() if factors else None,
    )  # fmt: skip


def widened(packed: ops.PackedLinear) -> Tensor:
    """What csrc/cuda/sm90a/widen.cuh makes of NVFP4 weights, times what the product multiplies with: (N, K)."""
    part = {name: section.of(packed.blob) for name, section in packed.spec.sections.items()}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    words = part["codes"].view(torch.int32).long() & 0xFFFFFFFF
    out = torch.zeros(words.shape[0] * 64, words.shape[1] * 64)
    for panel, step, thread in torch.cartesian_prod(*map(torch.arange, words.shape[:3])).tolist():
        warp, lane = divmod(thread, 32)
        for index, word in enumerate(words[panel, step, thread].tolist()):
            row, group = 16 * warp + lane // 4 + 8 * (index % 2), index // 2
            unit = 32 / part["raw_most"][panel * 64 + row]
            for half, register in enumerate((word, word >> 4 | word << 28)):
                codes = torch.tensor([register >> (8 * byte) & 0x87 for byte in range(4)])
                by = unit * part["scales"][panel, step, half * 2 + group, row].float()
                wide = (values[codes & 7] * by).to(torch.float8_e4m3fn).float() * (1 - 2 * (codes >> 7))
                first = step * 64 + half * 32 + group * 16 + lane % 4 * 4
                out[panel * 64 + row, first : first + 4] = wide * part["row_most"][panel * 64 + row] / 32
    return out[: packed.n, : packed.k]


def test_a_group_of_nvfp4_is_a_chunk_of_the_widening():
    linear = random_nvfp4(66, 128)
    got, exact = widened(ops.pack(linear, "sm90a")), ops.dequantize(linear)
    assert ((got - exact).abs() <= exact.abs() * 2**-4 + 1e-9).all()
    assert (got - exact).norm() <= 0.03 * exact.norm()


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize(("n", "k"), [(24, 128), (70, 192), (128, 64)])
def test_nvfp4_packs_and_comes_back(n: int, k: int, factors: bool):
    linear = random_nvfp4(n, k, factors=factors)
    check_nvfp4_comes_back(linear, "sm90a")


def test_what_has_no_form_goes_to_the_reference():
    linear = without_minus_eight(random_linear(Case(1, 16, 64, 16)))
    assert ops.pack(linear, "sm90a").backend == "sm90a"
    codes = linear.codes.clone()
    codes[3, 5] = 0x81  # -8 above 1
    assert ops.pack(ops.CanonicalLinear(**vars(linear) | {"codes": codes}), "sm90a").backend == "reference"
    half = {name: getattr(linear, name).half() for name in ("lora_down", "lora_up")}
    assert ops.pack(ops.CanonicalLinear(**vars(linear) | half), "sm90a").backend == "reference"


def test_memory_is_what_four_bits_need():
    linear = without_minus_eight(random_linear(Case(1, 3072, 3072, 32)))
    assert ops.pack(linear, "sm90a").nbytes <= 0.29 * 2 * 3072 * 3072


def test_fp8_tokens_of_the_reference():
    linear, x = random_linear(Case(1, 64, 256, 16)), torch.randn(9, 256, generator=torch.Generator().manual_seed(1))
    packed = ops.pack(linear, "reference", torch.float32)
    act = ops.quantize_act(x, packed, "fp8")
    assert act.codes.dtype == torch.float8_e4m3fn
    assert act.scales.shape == (9,)
    smooth = linear.smooth
    assert smooth is not None
    error = (act.codes.float() * act.scales[:, None] - x / smooth.float()).abs()
    assert (error <= (x / smooth.float()).abs() * 2.0**-4 + act.scales[:, None] * 2.0**-10).all()
    y, exact = ops.svdq_linear(x, packed, "fp8"), ops.svdq_linear(x, packed, "int8")
    assert torch.nn.functional.cosine_similarity(y.flatten(), exact.flatten(), dim=0) > 0.999


def test_modes_belong_to_backends():
    packed = ops.pack(random_linear(Case(1, 16, 64, 0)), "scalar")
    with pytest.raises(ArgumentError, match="mode: expected int8, int4, uint4 on backend scalar, got 'fp8'"):
        ops.svdq_linear(torch.zeros(1, 64), packed, "fp8")


def test_4_bit_tokens_take_amperes_kernels():
    layer = SVDQuantLinear(random_linear(Case(1, 48, 64, 16)), backend="sm90a", activation="w4a4", dtype=torch.bfloat16)
    assert (layer.backend, layer.mode) == ("sm80", "int4")
    assert layer.packed_wide is None
