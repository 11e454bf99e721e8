"""GPTQ: less output error than rounding each weight by itself, and codes that every kernel can hold."""

from __future__ import annotations

import torch

from engine import ops
from engine.quantize.gptq import gptq_int4
from engine.quantize.layer import Inputs, Recipe, quantize_group
from engine.quantize.rounding import round_int4


def correlated(samples: int, k: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(samples, k, generator=draw) @ torch.randn(k, k, generator=draw) * k**-0.5


def root_of(rows: torch.Tensor) -> torch.Tensor:
    moment = rows.T @ rows / len(rows)
    moment.diagonal().add_(0.01 * moment.diagonal().mean())
    return torch.linalg.cholesky(moment)


def test_less_error_than_rounding_alone():
    rows, weight = correlated(1024, 192), torch.randn(96, 192, generator=torch.Generator().manual_seed(1)) * 0.02
    importance = rows.square().mean(0)
    codes, scales, rounded = gptq_int4(weight, root_of(rows), importance, torch.bfloat16)
    plain = round_int4(weight, importance, torch.bfloat16)[2]
    error = lambda other: float((rows @ (weight - other).T).norm() / (rows @ weight.T).norm())  # noqa: E731
    assert error(rounded) < 0.8 * error(plain)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 7
    assert scales.shape == (96, 3)
    assert torch.equal(rounded, codes.float() * scales.float().repeat_interleave(64, dim=1))


def test_with_independent_inputs_it_rounds_to_the_nearest():
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    rounded = gptq_int4(weight, torch.eye(128), torch.ones(128), torch.bfloat16)[2]
    assert torch.equal(rounded, round_int4(weight, torch.ones(128), torch.bfloat16)[2])


def test_a_layer_gains_and_is_the_same_again():
    rows, weight = correlated(2048, 256), torch.randn(256, 256, generator=torch.Generator().manual_seed(3)) * 0.05
    inputs = Inputs(rows, rows.abs().amax(0))

    def error(recipe: Recipe) -> float:
        linear = quantize_group(weight, inputs, recipe).linear
        assert linear.lora_up is not None
        assert linear.lora_down is not None
        assert linear.smooth is not None
        whole = ops.dequantize(linear) / linear.smooth.float() + linear.lora_up.float() @ linear.lora_down.float()
        return float((rows @ (weight - whole).T).norm() / (rows @ weight.T).norm())

    assert error(Recipe(rank=16)) < 0.95 * error(Recipe(rank=16, gptq=False))
    first, second = (quantize_group(weight, inputs, Recipe(rank=16)).linear for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.wscales, second.wscales)
