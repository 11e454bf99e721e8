"""Biases that the published files store with something folded in, and how to take it out again.

`linear` may be wide, so sums over K run over blocks of rows: no more than some 25 MB are in use at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GELU_SHIFT", "add_one", "close", "shift_of", "subtract_one"]

# What W4A4 kernels add to a GELU output (minimum about -0.170) before they quantize it without a sign: 11/64.
GELU_SHIFT = 0.171875
_ROWS = 128


def shift_of(codes: Tensor, scales: Tensor, smooth: Tensor) -> Tensor:
    """GELU_SHIFT * sum_k code[n, k] * scale[n, k // 64] / smooth[k], as float64 (N).

    codes uint8 (N, K/2), scales (N, K/64), smooth (K). A published bias is the dense one minus this sum, taken there
    over the residual before it was rounded, which no reader has; what is added back here is what the 4-bit weights
    themselves contribute, so the layer's output on unshifted inputs is that of the published kernels.
    """
    groups = scales.shape[1]
    inverse = smooth.double().reciprocal()
    sums = torch.empty(codes.shape[0], dtype=torch.float64, device=codes.device)
    for start in range(0, codes.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        low, high = codes[rows] & 15, codes[rows] >> 4
        by_group = [
            _signed(nibbles).mul_(inverse[half::2]).view(-1, groups, 32).sum(-1)
            for half, nibbles in ((0, low), (1, high))
        ]
        sums[rows] = ((by_group[0] + by_group[1]) * scales[rows].double()).sum(-1)
    return GELU_SHIFT * sums


def add_one(bias: Tensor, chunks: int) -> Tensor:
    """Add 1 to the scale components of a modulation bias (chunk by chunk: shift, scale, gate, ...)."""
    return _step(bias, chunks, 1.0)


def subtract_one(bias: Tensor, chunks: int) -> Tensor:
    """Inverse of `add_one`."""
    return _step(bias, chunks, -1.0)


def close(left: Tensor, right: Tensor, stored: Tensor) -> bool:
    """Whether two readings of one bias differ by no more than 16-bit rounding of what was added and stored."""
    left, right, stored = left.double(), right.double(), stored.double()
    room = torch.stack([left.abs(), stored.abs(), (left - stored).abs()]).amax(0)
    return bool(((left - right).abs() <= 2.0**-7 * room).all())


def _signed(nibbles: Tensor) -> Tensor:
    """Two's complement nibbles as float64."""
    return ((nibbles.to(torch.int8) ^ 8) - 8).double()


def _step(bias: Tensor, chunks: int, by: float) -> Tensor:
    stepped = bias.double().clone().view(chunks, -1)
    stepped[1::3] += by
    return stepped.view(-1)
