"""INT4 rounding on a CUDA device in one kernel each, through Triton, which comes with torch's CUDA builds.

`rounding.round_int4` and one group of `gptq.gptq_int4` are searches within rows of 64 weights. As torch operations the
first takes some 170 kernels that each pass over the whole weight, the second 600 small ones for each 64 inputs: minutes
for a large model, in which the device mostly waits. Here a tile of rows stays in registers from first to last. Results
differ from the torch operations in last bits only; the same input gives the same bits.

Where Triton is missing the torch operations do the work; TRITON_INTERPRET=1 runs these kernels on a CPU, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["gptq_group", "round_int4", "takes"]

GROUP = 64
_ROWS = 16  # of a tile


def takes(weight: Tensor) -> bool:
    """Whether the kernels here can work on `weight` (N, K)."""
    there = weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return there and torch.version.hip is None and importlib.util.find_spec("triton") is not None


@cache
def _kernels() -> Any:
    from engine.quantize import fused_kernels  # which needs Triton at import

    return fused_kernels


def round_int4(weight: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `rounding.round_int4`: codes int8 (N, K), scales (N, K/64) of `dtype`, the rounded weight (N, K)."""
    weight = weight.contiguous()
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, k // GROUP, dtype=dtype, device=weight.device)
    rounded = torch.empty_like(weight)
    grid = (-(-n // _ROWS), k // GROUP)
    with _on(weight):
        _kernels().round_groups[grid](weight, importance.contiguous(), codes, scales, rounded, n, k, ROWS=_ROWS)
    return codes, scales, rounded


def gptq_group(weight: Tensor, spread: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `gptq._group`: `weight` (N, 64) may be columns of a wider matrix, `spread` (64, 64) is contiguous."""
    n = len(weight)
    codes, errors = (torch.empty(n, GROUP, device=weight.device) for _ in range(2))
    scales = torch.empty(n, 1, dtype=dtype, device=weight.device)
    with _on(weight):
        _kernels().gptq_columns[(-(-n // _ROWS),)](
            weight, weight.stride(0), spread, importance.contiguous(), codes, scales, errors, n, ROWS=_ROWS
        )
    return codes, scales.float(), errors


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device, whatever its tensors are on; there is none where it interprets."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.device(tensor.device)
