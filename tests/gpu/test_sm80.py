"""The kernels for Ampere and later against the reference in float64: the table of cases, and the CPU's codes."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.ops import backends, reference
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
