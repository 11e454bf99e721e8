"""Each wrong argument gives one ArgumentError that names it, what was expected and what came."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine import ops
from engine.errors import ArgumentError
from engine.ops.reference import QuantizedAct
from tests.ops.cases import Case, random_awq, random_linear

BF16 = torch.bfloat16
CASE = Case(2, 32, 128, 16)
WEIGHT = random_linear(CASE)
PACKED = ops.pack(WEIGHT, "reference")
X = torch.zeros(2, 128)


@pytest.mark.parametrize("op", [
    lambda x: ops.svdq_linear(x, PACKED, "int8"),
    lambda x: ops.quantize_act(x, PACKED, "int4"),
    lambda x: ops.awq_linear(x, ops.pack_awq(random_awq(CASE), "reference")),
])  # fmt: skip
@pytest.mark.parametrize(("x", "words"), [
    (torch.zeros(2, 64), r"x: expected 128 inputs .* \(2, 64\)"),
    (torch.tensor(1.0), r"x: expected 128 inputs .* \(\)"),
    (torch.zeros(2, 128, dtype=torch.float64), "x: expected bfloat16, float16 or float32, got torch.float64"),
    (torch.zeros(2, 128, device="meta"), "x: expected a tensor on cpu, as the weights are, got meta"),
])  # fmt: skip
def test_wrong_tokens(op, x: torch.Tensor, words: str):
    with pytest.raises(ArgumentError, match=words):
        op(x)


@pytest.mark.parametrize("op", [ops.svdq_linear, ops.quantize_act])
def test_wrong_mode(op):
    with pytest.raises(
        ArgumentError, match="mode: expected int8, int4, uint4, fp8, nvfp4 on backend reference, got 'int2'"
    ):
        op(X, PACKED, "int2")


@pytest.mark.parametrize(("change", "words"), [
    ({"codes": torch.zeros(2, 64, dtype=torch.int8)}, r"act\.scales|act\.codes"),
    ({"codes": torch.zeros(2, 128)}, r"act\.codes: expected torch.int8 on cpu, got torch.float32"),
    ({"codes": torch.zeros(2, 64, dtype=torch.int8)}, r"act\.codes: expected shape \(2, 128\), got \(2, 64\)"),
    ({"scales": torch.zeros(3)}, r"act\.scales: expected shape \(2,\) or \(2, 2\), got \(3,\)"),
    ({"low_rank": torch.zeros(2, 8)}, r"act\.low_rank: expected shape \(2, 16\), got \(2, 8\)"),
])  # fmt: skip
def test_wrong_quantized_tokens(change: dict[str, torch.Tensor], words: str):
    act = QuantizedAct(torch.zeros(2, 128, dtype=torch.int8), torch.zeros(2), torch.zeros(2, 16))
    with pytest.raises(ArgumentError, match=words):
        ops.linear(act._replace(**change), PACKED)


def test_wrong_output_type():
    act = ops.quantize_act(X, PACKED, "int8")
    with pytest.raises(ArgumentError, match=r"out_dtype: expected bfloat16, float16 or float32, got torch.int32"):
        ops.linear(act, PACKED, torch.int32)


def test_wrong_backend_and_type_for_packing():
    with pytest.raises(ArgumentError, match=r"backend: expected one of amx, avx512, .* got 'neon'"):
        ops.pack(WEIGHT, "neon")
    with pytest.raises(ArgumentError, match=r"dtype: expected bfloat16, float16 or float32, got torch.int8"):
        ops.pack(WEIGHT, "reference", torch.int8)


@pytest.mark.parametrize(("change", "words"), [
    ({"codes": torch.zeros(32, 64)}, "codes: expected uint8"),
    ({"codes": torch.zeros(32, 30, dtype=torch.uint8)}, "codes: .*K a multiple of 64"),
    ({"wscales": torch.zeros(32, 4, dtype=BF16)}, r"wscales: expected bfloat16 or float16 of shape \(32, 2\)"),
    ({"wscales": torch.zeros(32, 2)}, "wscales: expected bfloat16 or float16"),
    ({"smooth": torch.zeros(64)}, r"smooth: expected .* of shape \(128,\)"),
    ({"lora_down": None}, "lora_down, lora_up: expected both or neither"),
    ({"lora_down": torch.zeros(8, 128, dtype=BF16)}, "lora_down: expected a rank that is a multiple of 16, got 8"),
    ({"lora_up": torch.zeros(32, 32, dtype=BF16)}, r"lora_up: expected bfloat16 of shape \(32, 16\)"),
    ({"lora_up": torch.zeros(32, 16, dtype=torch.float16)}, "lora_up: expected bfloat16"),
    ({"bias": torch.zeros(31)}, r"bias: expected .* of shape \(32,\)"),
    ({"wtscale": torch.ones(1)}, "wtscale, wcscales: expected None"),
])  # fmt: skip
def test_wrong_weights(change: dict[str, torch.Tensor | None], words: str):
    with pytest.raises(ArgumentError, match=words):
        replace(WEIGHT, **change)


def test_wrong_awq_weights():
    weight = random_awq(CASE)
    with pytest.raises(ArgumentError, match="zeros: expected bfloat16"):
        replace(weight, zeros=weight.zeros.half())
    with pytest.raises(ArgumentError, match="scales: expected bfloat16 or float16"):
        replace(weight, scales=weight.scales.float())
