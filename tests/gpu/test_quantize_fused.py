"""The quantizer's kernels against the torch operations they stand in for, and a layer quantized on the device."""

from __future__ import annotations

import pytest
import torch

from engine.quantize import Recipe, fused, quantize_group
from engine.quantize.gptq import gptq_int4
from engine.quantize.inputs import Inputs
from engine.quantize.rounding import round_int4

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N, K, S = 200, 256, 1024
TYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def weight() -> torch.Tensor:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3, :64] = 0
    return weight.cuda()


@pytest.fixture
def rows() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(S, K, generator=draw) @ torch.randn(K, K, generator=draw) * K**-0.5).cuda()


def lost(weight: torch.Tensor, rounded: torch.Tensor, rows: torch.Tensor) -> float:
    return float((rows @ (weight - rounded).T).norm() / (rows @ weight.T).norm())


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding(weight: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    importance = rows.square().mean(0)
    found = round_int4(weight, importance, dtype)
    monkeypatch.setattr(fused, "takes", lambda _: False)
    wanted = round_int4(weight, importance, dtype)
    assert [part.dtype for part in found] == [part.dtype for part in wanted]
    # Sums are taken in another order, so that a row may choose another scale of nearly the same cost.
    assert float((found[1] != wanted[1]).float().mean()) < 0.01
    assert lost(weight, found[2], rows) == pytest.approx(lost(weight, wanted[2], rows), rel=1e-3)
    steps = found[1].float().repeat_interleave(64, 1)
    assert torch.equal(found[2], found[0].float() * steps)


@pytest.mark.parametrize("dtype", TYPES)
def test_gptq(weight: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    importance, root = Inputs(rows, rows.abs().amax(0)).moments(torch.ones(K, device="cuda"), 0.01)
    found = gptq_int4(weight, root, importance, dtype)
    monkeypatch.setattr(fused, "takes", lambda _: False)
    wanted = gptq_int4(weight, root, importance, dtype)
    assert lost(weight, found[2], rows) == pytest.approx(lost(weight, wanted[2], rows), rel=0.02)
    assert int(found[0].abs().max()) <= 7


def test_a_layer_is_the_same_again_and_as_good_as_on_a_cpu(weight: torch.Tensor, rows: torch.Tensor):
    inputs, recipe = Inputs(rows, rows.abs().amax(0)), Recipe(rank=16)
    first, second = (quantize_group(weight, inputs, recipe) for _ in range(2))
    assert torch.equal(first.linear.codes, second.linear.codes)
    assert torch.equal(first.linear.wscales, second.linear.wscales)
    cpu = quantize_group(weight.cpu(), Inputs(rows.cpu(), rows.abs().amax(0).cpu()), recipe)
    assert first.error == pytest.approx(cpu.error, rel=0.03)
