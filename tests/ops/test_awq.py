"""The weight-only linear on every backend, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.ops import reference
from tests.ops.cases import DTYPES, EPSILON, STRIDES, Case, random_awq, tokens

CASES = (Case(1, 16, 64, 0), Case(1, 400, 384, 0), Case(2, 33, 128, 0), Case(5, 7, 3072, 0), Case(67, 48, 192, 0))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_close_to_reference(backend: str, case: Case, dtype: torch.dtype):
    weight, x = random_awq(case, dtype), tokens(case, dtype)
    y = ops.awq_linear(x, ops.pack_awq(weight, backend, dtype))
    wanted = reference.awq_linear(x, weight, torch.float64)
    codes = ops.AwqWeight(weight.codes, weight.scales.abs(), weight.zeros.abs(), None)
    terms = reference.awq_linear(x.abs(), codes, torch.float64)
    assert y.dtype == dtype
    error, allowed = (y.double() - wanted).abs(), wanted.abs() * EPSILON[dtype] + terms * 2.0**-19
    assert (error <= allowed).all(), f"worst error is {(error / allowed).max():.2f} times the allowed one"


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_give_the_same_bits(backend: str, strides: str):
    case = Case(7, 40, 128, 0)
    packed = ops.pack_awq(random_awq(case), backend)
    x = tokens(case, torch.bfloat16, strides)
    y = ops.awq_linear(x, packed)
    assert y.shape == (*x.shape[:-1], 40)
    assert torch.equal(y, ops.awq_linear(x.clone(memory_format=torch.contiguous_format), packed))


def test_threads_never_change_a_bit(backend: str, threads):
    if backend == "reference":
        pytest.skip("torch's own product, which promises less")
    case = Case(2, 1040, 3072 if backend != "scalar" else 512, 0)
    packed, x = ops.pack_awq(random_awq(case), backend), tokens(case, torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(ops.awq_linear(x, packed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("m", [1, 5, 130])
def test_many_layers_at_once_give_the_same_bits(backend: str, m: int):
    layers = [ops.pack_awq(random_awq(Case(m, n, 128, 0), seed=n), backend) for n in (33, 64, 7)]
    x = tokens(Case(m, 7, 128, 0), torch.bfloat16).view(1, m, 128)
    found = ops.awq_linears(x, layers)
    assert len(found) == 3
    assert all(torch.equal(y, ops.awq_linear(x, packed)) for y, packed in zip(found, layers, strict=True))
    assert ops.awq_linears(x, []) == []
