"""The Hopper backend against the reference in float64, over the table of cases, and repeatable bit for bit."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.ops import backends, cuda, reference
from tests.ops.cases import CASES, DTYPES, Case, allowed_error, random_linear, tokens
from tests.ops.test_wgmma64 import without_minus_eight

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs a device of compute capability 9.0"),
    pytest.mark.skipif(backends.cuda_kernels() is None, reason="the CUDA module was not built (no nvcc)"),
]
LARGE = (Case(512, 3072, 3072, 32), Case(4608, 3072, 12288, 32), Case(200, 2240, 2240, 64), Case(1000, 1001, 640, 16))


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
