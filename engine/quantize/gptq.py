"""GPTQ (arXiv 2210.17323): round column by column, and let the columns still to come make up for what is lost."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from engine.quantize import fused
from engine.quantize.rounding import GROUP, round_int4

__all__ = ["error_spread", "gptq_int4"]


def error_spread(root: Tensor) -> Tensor:
    """Upper-triangular factor (K, K) for inputs of second moment root @ root.T; its row j says how an error in column
    j is best spread over the columns after it.
    """
    return torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)


def gptq_int4(
    weight: Tensor,
    root: Tensor,
    importance: Tensor,
    dtype: torch.dtype,
    spread: Tensor | None = None,
    *,
    search: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` (N, K) to codes -7..7 with a scale a row and 64 inputs, for inputs of second moment root @ root.T.

    root (K, K) lower triangular; importance (K) the mean square of each input, which weighs the choice of scales;
    `spread` is error_spread(root), for callers that round several weights for the same inputs. Each group's scales are
    chosen when its turn comes, from the weights as they stand then, by a `search` or not (round_int4). Returns codes
    int8 (N, K), scales (N, K/64) and the rounded weight, as round_int4 does.
    """
    left = weight.float().clone()
    spread = error_spread(root) if spread is None else spread
    step = fused.gptq_group if search and fused.takes(left) else partial(_group, search=search)
    codes, scales = torch.empty_like(left), []
    for begin in range(0, left.shape[1], GROUP):
        end = begin + GROUP
        inside = spread[begin:end, begin:end].contiguous()
        codes[:, begin:end], scale, errors = step(left[:, begin:end], inside, importance[begin:end], dtype)
        scales.append(scale)
        left[:, end:].addmm_(errors, spread[begin:end, end:], alpha=-1)
    steps = torch.cat(scales, 1)
    return codes.to(torch.int8), steps.to(dtype), codes * steps.repeat_interleave(GROUP, dim=1)


def _group(
    weight: Tensor, spread: Tensor, importance: Tensor, dtype: torch.dtype, *, search: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of `weight` (N, 64) in turn; returns codes (N, 64), scales (N, 1) and what was lost (N, 64)."""
    block = weight.clone()
    scale = round_int4(block, importance, dtype, search=search)[1].float()
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for j in range(GROUP):
        row = spread[j]
        column = block[:, j : j + 1]
        code = (column / scale).round().clamp(-7, 7)
        codes[:, j : j + 1] = code
        error = (column - code * scale) / row[j]
        block[:, j:] -= error * row[j:]
        errors[:, j : j + 1] = error
    return codes, scale, errors
