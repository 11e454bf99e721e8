"""Calls the compiled CUDA kernels: allocates with torch, passes addresses and the stream, raises what they answer.

Backend "sm90a" (H100, H200): W4A8 with e4m3 tokens (mode "fp8"). sm80.py calls those for other devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.errors import ArgumentError, BackendError
from engine.ops.backends import cuda_kernels
from engine.ops.layout import Spec
from engine.ops.reference import QuantizedAct

__all__ = ["check", "kernels", "linear", "quantize_act", "svdq_linear"]

# From so many tokens on a product is faster with weights that were widened to 8 bits first (csrc/cuda/sm90a/widen.cuh).
WIDE_FROM = 1024
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # enum DType in csrc/ops.h


def kernels() -> Any:
    """The compiled CUDA module. Raises BackendError where it is missing."""
    module = cuda_kernels()
    if module is None:
        raise BackendError("the CUDA kernels are not built; install with -C cmake.define.CUDA=ON where nvcc is")
    return module


def check(status: str | None) -> None:
    """Raise BackendError with what a launch answered, if it failed."""
    if status is not None:
        raise BackendError(f"a CUDA kernel could not run: {status}")


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as bfloat16 (M, K) whose rows begin on 16-byte borders; copies only where it must."""
    rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(torch.bfloat16)
    aligned = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.contiguous()


def _quantize(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """codes (M, K) e4m3, scales (M) fp32, low_rank (M, R) bfloat16."""
    if mode != "fp8":
        raise ArgumentError(f"mode: expected fp8 on backend sm90a, got {mode!r}")
    rows, parts = _rows(x), spec.sections
    m, where = rows.shape[0], x.device
    codes = torch.empty((m, spec.k), dtype=torch.float8_e4m3fn, device=where)
    scales = torch.empty(m, dtype=torch.float32, device=where)
    low_rank = torch.empty((m, spec.rank), dtype=torch.bfloat16, device=where)
    base = blob.data_ptr()
    target = (
        base + parts["inv_smooth"].offset,
        base + parts["down"].offset,
        codes.data_ptr(),
        scales.data_ptr(),
        low_rank.data_ptr(),
    )
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().quantize_fp8_sm90a(rows.data_ptr(), m, spec.k, rows.stride(0), target, spec.rank, stream))
    return codes, scales, low_rank


def _multiply(
    codes: Tensor, scales: Tensor, low_rank: Tensor, blob: Tensor, spec: Spec, out_dtype: torch.dtype,
    *, gelu: bool = False, tile: int = 0,
) -> Tensor:  # fmt: skip
    parts, m = spec.sections, codes.shape[0]
    y = torch.empty((m, spec.n), dtype=out_dtype, device=codes.device)
    base = blob.data_ptr()
    weights = tuple(base + parts[name].offset for name in ("codes", "scales", "row_most", "up", "bias"))
    blocks = parts["codes"].shape
    sizes = (m, blocks[0] * 64, blocks[1] * 64, spec.n, spec.k, spec.rank)
    # Where the weights are widened to e4m3, for this one product.
    wide = torch.empty(sizes[1] * sizes[2] if m >= WIDE_FROM else 0, dtype=torch.uint8, device=codes.device)
    addresses = (*weights, codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), y.data_ptr())
    addresses += (wide.data_ptr() if m >= WIDE_FROM else 0,)
    with torch.cuda.device(codes.device):
        stream = torch.cuda.current_stream().cuda_stream
        scale_dtype = DTYPES[parts["scales"].dtype]
        check(kernels().linear_fp8_sm90a(addresses, sizes, scale_dtype, DTYPES[out_dtype], gelu, tile, stream))
    return y


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """x (..., K) -> codes (M, K) e4m3, scales (M), low_rank (M, R) fp32."""
    codes, scales, low_rank = _quantize(x, blob, spec, mode)
    return QuantizedAct(codes, scales, low_rank.float())


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype) -> Tensor:
    """Quantized tokens -> y (M, N). The projection is multiplied in bfloat16, as the published kernels do."""
    codes, scales, low_rank = act
    factors = low_rank.to(torch.bfloat16).contiguous()
    return _multiply(codes.contiguous(), scales.contiguous(), factors, blob, spec, out_dtype)


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x: quantize_act, linear and, if wanted, GELU in its tanh form."""
    y = _multiply(*_quantize(x, blob, spec, mode), blob, spec, x.dtype, gelu=gelu)
    return y.view(*x.shape[:-1], spec.n)
