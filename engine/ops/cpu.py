"""Calls the compiled CPU kernels: allocates with torch, passes addresses, turns a status into BackendError."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from engine.errors import BackendError
from engine.ops.backends import cpu_kernels, isa_index
from engine.ops.reference import QuantizedAct
from engine.ops.spec import Spec, parse

__all__ = ["awq_linear", "linear", "quantize_act", "svdq_linear"]

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # enum DType in csrc/ops.h
MODES = {"int8": 0, "int4": 1, "uint4": 2}  # enum ActMode in csrc/ops.h


@lru_cache(maxsize=4096)
def _native(key: str) -> tuple[Any, int, Any]:
    """The compiled module, the instruction set's number, and the layer's sizes in the form the module takes.

    Cached by key, since hashing a string costs nothing the second time, and hashing a Spec a microsecond each time.
    """
    spec = parse(key)
    kernels, parts = cpu_kernels(), spec.sections
    if spec.family == "awq":
        offsets = tuple(parts[name].offset for name in ("codes", "scales", "zeros", "bias"))
        return kernels, isa_index(spec.backend), (spec.n, spec.k, DTYPES[parts["scales"].dtype], offsets)
    offsets = tuple(parts[name].offset for name in ("codes", "scales", "up", "down", "inv_smooth", "bias"))
    scales, low_rank = DTYPES[parts["scales"].dtype], DTYPES[parts["up"].dtype]
    panels = kernels.Panels(spec.n, spec.k, spec.rank, scales, low_rank, offsets)
    return kernels, isa_index(spec.backend), panels


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K) whose inputs lie side by side; copies only where strides demand it."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(status: str | None) -> None:
    if status is not None:
        raise BackendError(f"a CPU kernel could not run: {status}")


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """x (..., K) -> codes (M, K), scales, low_rank (M, R)."""
    kernels, isa, panels = _native(spec.key)
    rows = _rows(x)
    m = rows.shape[0]
    codes = torch.empty((m, spec.k), dtype=torch.int8)
    scales = torch.empty(m if mode == "int8" else (m, spec.k // 64), dtype=torch.float32)
    low_rank = torch.empty((m, spec.rank), dtype=torch.float32)
    if m:
        _check(kernels.quantize_act(
            isa, panels, blob.data_ptr(), rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), m, MODES[mode],
            codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), torch.get_num_threads(),
        ))  # fmt: skip
    return QuantizedAct(codes, scales, low_rank)


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype) -> Tensor:
    """Quantized tokens -> y (M, N)."""
    kernels, isa, panels = _native(spec.key)
    codes, scales, low_rank = (t.contiguous() for t in act)
    m, threads = codes.shape[0], torch.get_num_threads()
    y = torch.empty((m, spec.n), dtype=out_dtype)
    if m:
        scratch = torch.empty(kernels.linear_scratch(isa, panels, m, threads), dtype=torch.uint8)
        _check(kernels.linear(
            isa, panels, blob.data_ptr(), codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), m,
            MODES["int8" if scales.dim() == 1 else "int4"], y.data_ptr(), DTYPES[out_dtype],
            scratch.data_ptr(), scratch.numel(), threads,
        ))  # fmt: skip
    return y


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> Tensor:
    """x (..., K) -> y (..., N): quantize_act and linear in one call."""
    kernels, isa, panels = _native(spec.key)
    rows = _rows(x)
    m, dtype, threads, code = rows.shape[0], DTYPES[x.dtype], torch.get_num_threads(), MODES[mode]
    y = torch.empty((*x.shape[:-1], spec.n), dtype=x.dtype)
    if m:
        size = kernels.svdq_linear_scratch(isa, panels, m, code, threads)
        scratch = torch.empty(size, dtype=torch.uint8)
        _check(kernels.svdq_linear(
            isa, panels, blob.data_ptr(), rows.data_ptr(), dtype, rows.stride(0), m, code,
            y.data_ptr(), dtype, scratch.data_ptr(), size, threads,
        ))  # fmt: skip
    return y


def awq_linear(x: Tensor, blob: Tensor, spec: Spec) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x, weights only quantized."""
    kernels, isa, (n, k, scale_dtype, offsets) = _native(spec.key)
    rows = _rows(x).float()  # few tokens, each read once a panel of weights
    m = rows.shape[0]
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    if m:
        _check(kernels.awq_linear(
            isa, n, k, scale_dtype, blob.data_ptr(), offsets, rows.data_ptr(), rows.stride(0), m,
            y.data_ptr(), DTYPES[x.dtype], torch.get_num_threads(),
        ))  # fmt: skip
    return y
