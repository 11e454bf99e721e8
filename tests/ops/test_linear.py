"""Every backend against the reference in float64: one table of cases, all modes, all types."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from tests.ops.cases import (
    CASES,
    DTYPES,
    STRIDES,
    Case,
    allowed_error,
    check_a_bad_token,
    expected,
    random_linear,
    tokens,
)

MODES = ops.backends.modes("scalar")  # those of every backend for the CPU


def assert_close(y: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor) -> None:
    error = (y.double().view_as(wanted) - wanted).abs()
    worst = (error / allowed).max().item()
    assert (error <= allowed).all(), f"worst error is {worst:.2f} times the allowed one"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_are_equal_and_results_close(backend: str, case: Case, dtype: torch.dtype):
    weight, x = random_linear(case, dtype), tokens(case, dtype)
    packed = ops.pack(weight, backend, dtype)
    for mode in MODES:
        wanted_act, wanted = expected(x, weight, mode)
        act = ops.quantize_act(x, packed, mode)
        assert torch.equal(act.codes, wanted_act.codes)
        assert torch.equal(act.scales, wanted_act.scales)
        torch.testing.assert_close(act.low_rank.double(), wanted_act.low_rank, rtol=1e-5, atol=2e-5)
        y = ops.linear(act, packed, dtype)
        assert y.dtype == dtype
        assert y.shape == (case.m, case.n)
        assert_close(y, wanted, allowed_error(wanted_act, weight, wanted, dtype))
        assert torch.equal(ops.svdq_linear(x, packed, mode), y)


MANY = (Case(256, 24, 64, 0), Case(257, 33, 192, 16), Case(300, 400, 128, 32), Case(600, 80, 15360, 32))


def folded_error(act: ops.schema.reference.QuantizedAct, weight: ops.CanonicalLinear) -> torch.Tensor:
    """What 8-bit weights may add to `allowed_error`: half a step of each output (and 2^-7 of it) a code."""
    step = weight.wscales.double().abs().amax(1) * (8 / 127)
    return (act.codes.double().abs().sum(1) * act.scales.double())[:, None] * step * (0.5 + 2.0**-7)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_tokens(backend: str, case: Case, dtype: torch.dtype, threads):
    """From 256 tokens on AMX multiplies by 8-bit weights into which it folds the group scales; the others do not."""
    if backend in ("scalar", "amx_emulated"):
        case = case._replace(k=min(case.k, 320))  # these are slow
    weight, x = random_linear(case, dtype), tokens(case, dtype)
    weight.wscales[0, 0] *= 50  # a group beside which its output's others are small
    weight.wscales[-1, 0] = 0
    weight.wscales[1] *= -1
    packed = ops.pack(weight, backend, dtype)
    act, wanted = expected(x, weight, "int8")
    allowed = allowed_error(act, weight, wanted, dtype)
    if backend in ("amx", "amx_emulated"):
        allowed = allowed + folded_error(act, weight)
    y = ops.svdq_linear(x, packed, "int8")
    assert_close(y, wanted, allowed)
    if backend == "reference":
        return
    for count in (1, 3):
        threads(count)
        assert torch.equal(ops.svdq_linear(x, packed, "int8"), y)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_give_the_same_bits(backend: str, strides: str, dtype: torch.dtype):
    case = Case(19, 40, 256, 16)
    weight, x = random_linear(case, dtype), tokens(case, dtype, strides)
    packed = ops.pack(weight, backend, dtype)
    plain = x.clone(memory_format=torch.contiguous_format)
    y = ops.svdq_linear(x, packed, "int8")
    assert y.shape == (*x.shape[:-1], case.n)
    assert torch.equal(y, ops.svdq_linear(plain, packed, "int8"))
    assert not y.isnan().any()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_output_type_is_free(backend: str, out_dtype: torch.dtype):
    case = Case(6, 24, 128, 16)
    weight, x = random_linear(case), tokens(case, torch.bfloat16)
    packed = ops.pack(weight, backend)
    act, wanted = expected(x, weight, "int8")
    y = ops.linear(ops.quantize_act(x, packed, "int8"), packed, out_dtype)
    allowed = allowed_error(act, weight, wanted, out_dtype)
    assert_close(y, wanted, allowed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "size"), [
    (torch.bfloat16, 1e30), (torch.bfloat16, 1e-30), (torch.float16, 5e2), (torch.float16, 6e-8),
    (torch.float32, 1e30), (torch.float32, 1e-30),
], ids=str)  # fmt: skip
def test_extreme_sizes(backend: str, dtype: torch.dtype, size: float, mode: str):
    case = Case(9, 32, 192, 16)
    weight = random_linear(case, dtype, bias=False)
    x = (tokens(case, torch.float32) * size).to(dtype)
    packed = ops.pack(weight, backend, dtype)
    wanted_act, wanted = expected(x, weight, mode)
    act = ops.quantize_act(x, packed, mode)
    assert torch.equal(act.codes, wanted_act.codes)
    assert torch.equal(act.scales, wanted_act.scales)
    assert_close(ops.linear(act, packed, torch.float32), wanted, allowed_error(wanted_act, weight, wanted, dtype))


@pytest.mark.parametrize("mode", MODES)
def test_zero_rows_and_zero_groups(backend: str, mode: str):
    case = Case(5, 20, 192, 16)
    weight, x = random_linear(case), tokens(case, torch.bfloat16)
    x[1] = 0
    x[3, 64:128] = 0
    x[4, :64] = 1e-38  # below the size that counts
    packed = ops.pack(weight, backend)
    wanted_act, wanted = expected(x, weight, mode)
    act = ops.quantize_act(x, packed, mode)
    assert torch.equal(act.codes, wanted_act.codes)
    assert torch.equal(act.scales, wanted_act.scales)
    y = ops.linear(act, packed, torch.float32)
    assert_close(y, wanted, allowed_error(wanted_act, weight, wanted, torch.bfloat16))
    if mode != "uint4":
        assert weight.bias is not None
        assert torch.equal(y[1], weight.bias.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_its_own_row_only(backend: str, bad: float):
    case = Case(17, 32, 128, 0)
    weight, x = random_linear(case), tokens(case, torch.bfloat16)
    packed = ops.pack(weight, backend)
    check_a_bad_token(packed, x, bad)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [Case(1, 2048, 1024, 32), Case(61, 272, 1024, 16), Case(128, 1040, 512, 32)], ids=str)
def test_threads_never_change_a_bit(backend: str, case: Case, mode: str, threads):
    if backend == "reference":
        pytest.skip("torch's own product, which promises less")
    if backend in ("scalar", "amx_emulated"):
        case = case._replace(n=case.n // 16 + 1)  # these are slow
    packed = ops.pack(random_linear(case), backend)
    x = tokens(case, torch.bfloat16)
    results = []
    for count in (1, 2, 3, 7, 2):
        threads(count)
        results.append(ops.svdq_linear(x, packed, mode))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_tokens(backend: str):
    case = Case(3, 24, 64, 16)
    packed = ops.pack(random_linear(case), backend)
    assert ops.svdq_linear(torch.empty(2, 0, 64, dtype=torch.bfloat16), packed, "int8").shape == (2, 0, 24)
    assert ops.quantize_act(torch.empty(0, 64), packed, "int4").scales.shape == (0, 1)


def test_plain_linear_without_smooth_rank_or_bias(backend: str):
    case = Case(4, 32, 128, 0)
    weight, x = random_linear(case, smooth=False, bias=False), tokens(case, torch.float32)
    act, wanted = expected(x, weight, "int8")
    y = ops.svdq_linear(x, ops.pack(weight, backend, torch.float32), "int8")
    assert_close(y, wanted, allowed_error(act, weight, wanted, torch.float32))


def test_quantization_follows_the_formula():
    """The reference itself, on numbers worked out by hand."""
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([1.0, -2.0, 0.5, 4.0])
    smooth = torch.ones(64)
    smooth[3] = 2.0
    int8 = ops.schema.reference.quantize_act(x, smooth, None, "int8")
    assert int8.codes[0, :4].tolist() == [64, -127, 32, 127]  # 63.5 and 31.75, halves to even
    assert int8.scales.item() == pytest.approx(2 / 127)
    int4 = ops.schema.reference.quantize_act(x, smooth, None, "int4")
    assert int4.codes[0, :4].tolist() == [4, -7, 2, 7]  # 3.5 and 1.75
    uint4 = ops.schema.reference.quantize_act(x.clamp(min=-0.17), smooth, None, "uint4")
    assert uint4.codes.min() >= 0
    assert uint4.scales.item() == pytest.approx((4 + 0.171875) / 2 / 15)
