"""Smooth factors: how much of each input channel's size moves from the activation into the weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["candidates"]

_LIMIT = 1e4


def candidates(weight: Tensor, largest_input: Tensor, alphas: tuple[float, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return smooth factors (K) to try for `weight` (N, K), one for each alpha; the first is all ones.

    SmoothQuant's closed form, max|x|^alpha / max|w|^(1 - alpha), scaled to a geometric mean of one. The input is
    divided by the factor and the weight multiplied by it. Values are rounded to `dtype`, as stored.
    """
    smooth_input = largest_input.float().clamp_min(1e-6)
    smooth_weight = weight.float().abs().amax(0).clamp_min(1e-6)
    found = [torch.ones_like(smooth_input)]
    for alpha in alphas:
        factor = smooth_input**alpha / smooth_weight ** (1 - alpha)
        factor = factor / factor.log().mean().exp()
        found.append(factor.clamp(1 / _LIMIT, _LIMIT))
    return [factor.to(dtype).float() for factor in found]
