"""GPTQ (arXiv 2210.17323): round column by column, and let the columns still to come make up for what is lost."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.rounding import GROUP, round_int4

__all__ = ["gptq_int4"]


def gptq_int4(weight: Tensor, root: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` (N, K) to codes -7..7 with a scale a row and 64 inputs, for inputs of second moment root @ root.T.

    root (K, K) lower triangular; importance (K) the mean square of each input, which weighs the choice of scales.
    Each group's scales are chosen when its turn comes, from the weights as they stand then. Returns codes int8 (N,
    K), scales (N, K/64) and the rounded weight, as round_int4 does.
    """
    left = weight.float().clone()
    # Row j of this factor says how an error in column j is best spread over the columns after it.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    codes, scales = torch.empty_like(left), []
    for begin in range(0, left.shape[1], GROUP):
        end = begin + GROUP
        block = left[:, begin:end].clone()
        scale = round_int4(block, importance[begin:end], dtype)[1].float()
        scales.append(scale)
        errors = torch.empty_like(block)
        for j in range(GROUP):
            row = spread[begin + j, begin:end]
            column = block[:, j : j + 1]
            code = (column / scale).round().clamp(-7, 7)
            codes[:, begin + j : begin + j + 1] = code
            error = (column - code * scale) / row[j]
            block[:, j:] -= error * row[j:]
            errors[:, j : j + 1] = error
        left[:, end:] -= errors @ spread[begin:end, end:]
    steps = torch.cat(scales, 1)
    return codes.to(torch.int8), steps.to(dtype), codes * steps.repeat_interleave(GROUP, dim=1)
