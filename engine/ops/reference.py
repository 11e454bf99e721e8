"""Every op in plain torch, on any device: the definition that each compiled backend answers to.

Codes are defined by single fp32 operations, so they are equal on every backend, bit for bit. What follows the codes may
be computed in float64 (`compute`), which is what the tests compare against. Published kernels round x / smooth and the
token scales to 16 bits first (and accumulate in 16 bits); here both stay fp32, which is closer to the formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.ops.canonical import AwqWeight, CanonicalLinear, dequantize, dequantize_awq

__all__ = ["GELU_SHIFT", "MODES", "QuantizedAct", "awq_linear", "linear", "quantize_act"]

GELU_SHIFT = 0.171875  # 11/64: lifts the minimum of GELU, about -0.170, above zero; exact in every float type
TINY_MAX = 2.0**-120  # a token or group whose largest value is below this counts as zero
# mode -> (levels, lowest code): int8 and fp8 share a scale over a token, the others over 64 inputs of a token.
MODES = {"int8": (127.0, -127), "int4": (7.0, -8), "uint4": (15.0, 0), "fp8": (448.0, -448)}


class QuantizedAct(NamedTuple):
    """Quantized tokens: codes (M, K), scales (M) or (M, K/64) fp32, low_rank (M, R) fp32 = x @ lora_down.T.

    Codes are int8, in mode "fp8" float8_e4m3fn.
    """

    codes: Tensor
    scales: Tensor
    low_rank: Tensor


def quantize_act(
    x: Tensor, smooth: Tensor | None, lora_down: Tensor | None, mode: str, compute: torch.dtype = torch.float32
) -> QuantizedAct:
    """x (M, K) -> codes, scales, low_rank. `mode` is a key of MODES; "uint4" adds GELU_SHIFT before smoothing.

    t = (x [+ shift]) * (1 / smooth);  m = max|t|;  scale = m * (1 / levels);  code = round_half_even(t * (levels / m)),
    to an integer, in mode "fp8" to e4m3.
    """
    levels, lowest = MODES[mode]
    t = x.float() + GELU_SHIFT if mode == "uint4" else x.float()
    if smooth is not None:
        t = t * (1.0 / smooth.float())
    runs = t if mode in ("int8", "fp8") else t.unflatten(1, (-1, 64))
    largest = runs.abs().amax(dim=-1, keepdim=True)
    # A tensor divided by a tensor: torch turns number / tensor into number * reciprocal, which rounds twice.
    inverse = torch.full_like(largest, levels) / largest
    inverse = torch.where((largest >= TINY_MAX) & largest.isfinite(), inverse, 0.0)
    codes = (runs * inverse).nan_to_num(0.0)
    if mode == "fp8":
        codes = codes.clamp(lowest, levels).to(torch.float8_e4m3fn)
    else:
        codes = codes.round().clamp(lowest, levels).to(torch.int8).view_as(t)
    scales = torch.where(largest < TINY_MAX, 0.0, largest * (1.0 / levels)).squeeze(-1)
    low_rank = x.new_zeros((x.shape[0], 0), dtype=compute)
    if lora_down is not None:
        low_rank = x.to(compute) @ lora_down.to(compute).T
    return QuantizedAct(codes, scales, low_rank)


def linear(act: QuantizedAct, weight: CanonicalLinear, compute: torch.dtype = torch.float32) -> Tensor:
    """y (M, N) = (codes * scales) @ dequant(weight).T + low_rank @ lora_up.T + bias, in `compute`."""
    scales = act.scales.to(compute)
    if scales.dim() == 1:
        y = (act.codes.to(compute) @ dequantize(weight, compute).T) * scales[:, None]
    else:
        tokens = act.codes.to(compute).unflatten(1, (-1, 64)) * scales[..., None]
        y = tokens.flatten(1) @ dequantize(weight, compute).T
    if weight.lora_up is not None:
        y = y + act.low_rank.to(compute) @ weight.lora_up.to(compute).T
    return y if weight.bias is None else y + weight.bias.to(compute)


def awq_linear(x: Tensor, weight: AwqWeight, compute: torch.dtype = torch.float32) -> Tensor:
    """y (M, N) = x @ (codes * scales + zeros).T + bias, in `compute`."""
    y = x.to(compute) @ dequantize_awq(weight, compute).T
    return y if weight.bias is None else y + weight.bias.to(compute)
