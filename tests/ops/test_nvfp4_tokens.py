"""Tokens in NVFP4: rounding, scales, bad numbers, and the linear on them against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.errors import ArgumentError
from engine.ops import reference
from engine.ops.canonical import E2M1, split_nibbles
from tests.ops.cases import Case, random_linear, tokens
from tests.ops.test_wgmma64 import random_nvfp4

GRID = torch.tensor(E2M1[:8], dtype=torch.float64)


def quantized(t: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M, K) of 0..15 and scales (M, K/16) of smoothed tokens."""
    codes, scales = reference.quantize_nvfp4(t)
    return split_nibbles(codes), scales


def test_codes_are_the_nearest_and_ties_go_to_the_even_one():
    ladder = torch.linspace(0, 6, 385).repeat(2)  # every tie is among them: steps of 1/64
    ladder[385:] *= -1
    t = torch.cat((ladder, torch.zeros(-len(ladder) % 15))).view(-1, 15)
    t = torch.cat((torch.full((len(t), 1), 6.0), t), 1)  # so that the scale is 1
    codes, scales = quantized(t)
    assert (scales.float() == 1).all()
    distance = (t.double().abs()[..., None] - GRID).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    ties = nearest.sum(-1) == 2
    assert ties.sum() >= 14
    chosen = nearest.gather(-1, (codes & 7).long()[..., None]).squeeze(-1)
    assert chosen.all()
    assert (codes[ties] % 2 == 0).all()
    assert torch.equal(codes >> 3 == 1, t.signbit())


def test_scales_are_the_stored_ones_and_never_zero():
    largest = torch.tensor([6.0, 6.3, 1e-3, 2e-5, 0.0, 2688.0, 1e6])
    t = torch.zeros(7, 16)
    t[:, 0], t[:, 1] = largest, -largest / 2
    codes, scales = quantized(t)
    wanted = (largest.double() / 6).clamp(2**-9, 448)
    assert ((scales[:, 0].double() - wanted).abs() <= wanted / 16).all()
    assert scales[2:5, 0].tolist() == [2**-9] * 3
    assert scales[5:, 0].tolist() == [448.0] * 2
    assert codes[:, 0].tolist() == [7, 7, 1, 0, 0, 7, 7]  # 1e-3 is half of 2^-9: the code of 0.5
    assert codes[6, 1] == 15


def test_a_bad_number_spoils_its_group():
    for bad in (float("nan"), float("inf"), -float("inf")):
        t = torch.ones(3, 64)
        t[1, 20] = bad
        codes, scales = quantized(t)
        assert scales.float().isnan().nonzero().tolist() == [[1, 1]]
        assert not codes[1, 16:32].any()
        assert (codes[0] == 7).all()


def test_rounding_costs_a_tenth():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    for size in (300.0, 1.0, 0.01):
        act = reference.quantize_act(x * size, None, None, "nvfp4")
        error = (reference.token_values(act) - x * size).norm() / (x * size).norm()
        assert error < (0.1 if size >= 1 else 0.13)


@pytest.mark.parametrize("case", [Case(1, 16, 64, 0), Case(5, 7, 1536, 16), Case(37, 70, 320, 48)], ids=str)
def test_the_linear_is_the_formula(case: Case):
    linear, x = random_nvfp4(case.n, case.k, case.rank), tokens(case, torch.bfloat16)
    packed = ops.pack(linear, "reference")
    act = ops.quantize_act(x, packed, "nvfp4")
    assert (act.codes.dtype, act.codes.shape) == (torch.uint8, (case.m, case.k // 2))
    assert (act.scales.dtype, act.scales.shape) == (torch.float8_e4m3fn, (case.m, case.k // 16))
    y = ops.linear(act, packed, torch.float32)
    by = act.scales.double().repeat_interleave(16, 1)
    left = torch.tensor(E2M1, dtype=torch.float64)[split_nibbles(act.codes).long()] * by
    wanted = left @ ops.dequantize(linear, torch.float64).T
    if linear.lora_up is not None and linear.lora_down is not None:
        wanted += x.double() @ linear.lora_down.double().T @ linear.lora_up.double().T
    assert linear.bias is not None
    torch.testing.assert_close(y.double(), wanted + linear.bias.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(ops.svdq_linear(x, packed, "nvfp4"), y.bfloat16())


def test_int4_weights_take_such_tokens_too():
    case = Case(9, 40, 256, 16)
    packed, x = ops.pack(random_linear(case, torch.float32), "reference"), tokens(case, torch.float32)
    y, exact = ops.svdq_linear(x, packed, "nvfp4"), ops.svdq_linear(x, packed, "int8")
    assert 0 < (y - exact).norm() < 0.2 * exact.norm()


def test_no_tokens():
    packed = ops.pack(random_nvfp4(24, 64), "reference")
    assert ops.svdq_linear(torch.empty(2, 0, 64), packed, "nvfp4").shape == (2, 0, 24)


def test_tokens_must_be_those_of_the_backend():
    case = Case(3, 16, 64, 0)
    x = tokens(case, torch.bfloat16)
    act = ops.quantize_act(x, ops.pack(random_linear(case), "reference"), "nvfp4")
    with pytest.raises(ArgumentError, match="on backend scalar, got 'nvfp4'"):
        ops.linear(act, ops.pack(random_linear(case), "scalar"))
    with pytest.raises(ArgumentError, match="mode: expected nvfp4 on backend sm120a, got 'int8'"):
        ops.svdq_linear(x, ops.pack(random_nvfp4(16, 64), "sm120a"), "int8")


def test_shapes_are_known_before_the_run():
    packed = ops.pack(random_nvfp4(24, 128), "reference")
    x = torch.empty(5, 128, dtype=torch.bfloat16)
    real = torch.ops.nibble.quantize_act.default(x.zero_(), packed.blob, packed.spec.key, "nvfp4")
    fake = torch.ops.nibble.quantize_act.default(x.to("meta"), packed.blob.to("meta"), packed.spec.key, "nvfp4")
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
