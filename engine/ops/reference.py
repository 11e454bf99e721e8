"""Every op in plain torch, on any device: the definition that each compiled backend answers to.

Codes are defined by single fp32 operations, so they are equal on every backend, bit for bit. What follows the codes may
be computed in float64 (`compute`), which is what the tests compare against. Published kernels round x / smooth and the
token scales to 16 bits first (and accumulate in 16 bits); here both stay fp32, which is closer to the formula.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.ops.canonical import (
    E2M1,
    AwqWeight,
    CanonicalLinear,
    dequantize,
    dequantize_awq,
    join_nibbles,
    split_nibbles,
)

__all__ = ["GELU_SHIFT", "MODES", "QuantizedAct", "act_layout", "awq_linear", "linear", "quantize_act", "token_values"]

GELU_SHIFT = 0.171875  # 11/64: lifts the minimum of GELU, about -0.170, above zero; exact in every float type
TINY_MAX = 2.0**-120  # a token or group whose largest value is below this counts as zero
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-9, 448.0  # of NVFP4 tokens: the smallest of e4m3 above zero, and its largest
# mode -> (levels, lowest code): int8 and fp8 share a scale over a token, nvfp4 over 16 inputs of a token, the others
# over 64.
MODES = {"int8": (127.0, -127), "int4": (7.0, -8), "uint4": (15.0, 0), "fp8": (448.0, -448), "nvfp4": (6.0, -6)}


class QuantizedAct(NamedTuple):
    """Quantized tokens: codes (M, K), scales (M) or (M, K/64) fp32, low_rank (M, R) fp32 = x @ lora_down.T.

    Codes are int8, in mode "fp8" float8_e4m3fn. Mode "nvfp4": codes (M, K/2) uint8, two e2m1 codes a byte as in
    CanonicalLinear, and scales (M, K/16) float8_e4m3fn.
    """

    codes: Tensor
    scales: Tensor
    low_rank: Tensor


def act_layout(mode: str, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape behind M of codes and scales."""
    if mode == "nvfp4":
        return {"codes": (torch.uint8, (k // 2,)), "scales": (torch.float8_e4m3fn, (k // 16,))}
    return {
        "codes": (torch.float8_e4m3fn if mode == "fp8" else torch.int8, (k,)),
        "scales": (torch.float32, () if mode in ("int8", "fp8") else (k // 64,)),
    }


def quantize_act(
    x: Tensor, smooth: Tensor | None, lora_down: Tensor | None, mode: str, compute: torch.dtype = torch.float32
) -> QuantizedAct:
    """x (M, K) -> codes, scales, low_rank. `mode` is a key of MODES; "uint4" adds GELU_SHIFT before smoothing.

    t = (x [+ shift]) * (1 / smooth);  m = max|t|;  scale = m * (1 / levels);  code = round_half_even(t * (levels / m)),
    to an integer, in mode "fp8" to e4m3. Mode "nvfp4": see quantize_nvfp4.
    """
    low_rank = x.new_zeros((x.shape[0], 0), dtype=compute)
    if lora_down is not None:
        low_rank = x.to(compute) @ lora_down.to(compute).T
    levels, lowest = MODES[mode]
    t = x.float() + GELU_SHIFT if mode == "uint4" else x.float()
    if smooth is not None:
        t = t * (1.0 / smooth.float())
    if mode == "nvfp4":
        return QuantizedAct(*quantize_nvfp4(t), low_rank)
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
    return QuantizedAct(codes, scales, low_rank)


def quantize_nvfp4(t: Tensor) -> tuple[Tensor, Tensor]:
    """Smoothed tokens t (M, K) fp32 -> codes (M, K/2), scales (M, K/16).

    m = max|t| of 16;  scale = e4m3(min(max(m * (1/6), 2^-9), 448));  code = e2m1(t * (1 / scale)); both round to
    nearest, ties to even, and codes stop at 6. The scale of a code is the one that is stored, not the one before its
    rounding, and it is never 0: what would round to 0 gets the smallest scale, which tells values from 2^-11 on apart.
    16 inputs with an infinity or NaN among them have the scale NaN and codes of 0.
    """
    runs = t.unflatten(1, (-1, 16))
    largest = runs.abs().amax(dim=-1, keepdim=True)
    scales = (largest * (1.0 / 6.0)).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    scales = torch.where(largest.isfinite(), scales, torch.nan).to(torch.float8_e4m3fn)
    values = runs * (torch.ones_like(largest) / scales.float())
    return join_nibbles(_e2m1(values).flatten(1)), scales.squeeze(-1)


def _e2m1(values: Tensor) -> Tensor:
    """The nearest e2m1 code of each value, half-way points to the even code; 0 for NaN."""
    magnitude = values.abs()
    above = [magnitude > bound for bound in (0.25, 1.25, 2.5, 5.0)]
    reached = [magnitude >= bound for bound in (0.75, 1.75, 3.5)]
    code = torch.stack(above + reached).sum(0)
    return torch.where(values.isnan(), 0, code | values.signbit().long() << 3).to(torch.uint8)


def token_values(act: QuantizedAct, compute: torch.dtype = torch.float32) -> Tensor:
    """What quantized tokens stand for, (M, K): codes times scales."""
    if act.scales.dtype == torch.float8_e4m3fn:
        codes = torch.tensor(E2M1, dtype=compute, device=act.codes.device)[split_nibbles(act.codes).long()]
    else:
        codes = act.codes.to(compute)
    scales = act.scales.to(compute)
    scales = scales[:, None] if scales.dim() == 1 else scales
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def linear(act: QuantizedAct, weight: CanonicalLinear, compute: torch.dtype = torch.float32) -> Tensor:
    """y (M, N) = (codes * scales) @ dequant(weight).T + low_rank @ lora_up.T + bias, in `compute`."""
    if act.scales.dim() == 1:
        y = (act.codes.to(compute) @ dequantize(weight, compute).T) * act.scales.to(compute)[:, None]
    else:
        y = token_values(act, compute) @ dequantize(weight, compute).T
    if weight.lora_up is not None:
        y = y + act.low_rank.to(compute) @ weight.lora_up.to(compute).T
    return y if weight.bias is None else y + weight.bias.to(compute)


def awq_linear(x: Tensor, weight: AwqWeight, compute: torch.dtype = torch.float32) -> Tensor:
    """y (M, N) = x @ (codes * scales + zeros).T + bias, in `compute`."""
    y = x.to(compute) @ dequantize_awq(weight, compute).T
    return y if weight.bias is None else y + weight.bias.to(compute)
