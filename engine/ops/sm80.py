"""Calls the CUDA kernels for Ampere and everything after it: W4A4 and W4A8 by integers, and the weight-only linear.

They read the layout of the CPU kernels ("panel16"), and give the CPU's codes and scales bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.canonical import dequantize_awq
from engine.ops.cpu import DTYPES, MODES
from engine.ops.cuda import check, kernels
from engine.ops.layout import PackedAwq, unpack_awq
from engine.ops.reference import QuantizedAct
from engine.ops.spec import Spec, parse

__all__ = ["awq_linear", "awq_linears_", "linear", "quantize_act", "svdq_linear"]

# The weight-only kernel widens weights anew for every eight tokens.
DENSE_FROM = 128


@lru_cache(maxsize=4096)
def _layer(key: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Byte offsets of a layer's parts, and its sizes with the types of its 16-bit parts. Cached as in cpu.py."""
    spec = parse(key)
    parts = spec.sections
    if spec.family == "awq":
        offsets = tuple(parts[name].offset for name in ("codes", "scales", "zeros", "bias"))
        return offsets, (spec.n, spec.k, DTYPES[parts["scales"].dtype])
    offsets = tuple(parts[name].offset for name in ("codes", "scales", "up", "down", "inv_smooth", "bias"))
    return offsets, (spec.n, spec.k, spec.rank, DTYPES[parts["scales"].dtype], DTYPES[parts["up"].dtype])


def _addresses(blob: Tensor, offsets: tuple[int, ...]) -> tuple[int, ...]:
    base = blob.data_ptr()
    return tuple(base + offset for offset in offsets)


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K) whose rows begin on 16-byte borders; copies only where it must."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    size = rows.element_size()
    aligned = rows.stride(1) == 1 and rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """x (..., K) -> codes (M, K) int8, scales (M) or (M, K/64), low_rank (M, R) fp32."""
    rows, where = _rows(x), x.device
    m, (offsets, sizes) = rows.shape[0], _layer(spec.key)
    codes = torch.empty((m, spec.k), dtype=torch.int8, device=where)
    scales = torch.empty(m if mode == "int8" else (m, spec.k // 64), dtype=torch.float32, device=where)
    low_rank = torch.empty((m, spec.rank), dtype=torch.float32, device=where)
    with torch.cuda.device(where):
        check(kernels().quantize_act_sm80(
            _addresses(blob, offsets), sizes, rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), m, MODES[mode],
            codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), torch.cuda.current_stream().cuda_stream,
        ))  # fmt: skip
    return QuantizedAct(codes, scales, low_rank)


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype) -> Tensor:
    """Quantized tokens -> y (M, N)."""
    codes, scales, low_rank = (_rows(t) if t is act.codes else t.contiguous() for t in act)
    m, (offsets, sizes) = codes.shape[0], _layer(spec.key)
    codes = codes.contiguous()
    y = torch.empty((m, spec.n), dtype=out_dtype, device=codes.device)
    with torch.cuda.device(codes.device):
        check(kernels().linear_sm80(
            _addresses(blob, offsets), sizes, codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), m,
            MODES["int8" if scales.dim() == 1 else "int4"], y.data_ptr(), DTYPES[out_dtype],
            torch.cuda.current_stream().cuda_stream,
        ))  # fmt: skip
    return y


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x."""
    return linear(quantize_act(x, blob, spec, mode), blob, spec, x.dtype).view(*x.shape[:-1], spec.n)


def awq_linear(x: Tensor, blob: Tensor, spec: Spec) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x, weights only quantized.

    From DENSE_FROM tokens on (a text encoder's) the weights are widened to the dtype of x for one product.
    """
    if x.numel() >= DENSE_FROM * spec.k:
        weight = unpack_awq(PackedAwq(blob, spec, x.dtype))
        bias = None if weight.bias is None else weight.bias.to(x.dtype)
        return F.linear(x, dequantize_awq(weight).to(x.dtype), bias)
    rows = _rows(x.float())  # few tokens, each read once a panel of weights
    m, (offsets, sizes) = rows.shape[0], _layer(spec.key)
    y = torch.empty((*x.shape[:-1], spec.n), dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        check(kernels().awq_linear_sm80(
            _addresses(blob, offsets), sizes, rows.data_ptr(), rows.stride(0), m, y.data_ptr(), DTYPES[x.dtype],
            torch.cuda.current_stream().cuda_stream,
        ))  # fmt: skip
    return y


def awq_linears_(
    flat: Tensor, starts: Sequence[int], x: Tensor, blobs: Sequence[Tensor], specs: Sequence[Spec]
) -> None:
    """flat[start : start + M * N] = awq_linear of each layer as (M, N), in one launch; M below DENSE_FROM."""
    rows, size, layers = _rows(x.float()), flat.element_size(), []
    for blob, spec, start in zip(blobs, specs, starts, strict=True):
        offsets, (n, _, scales) = _layer(spec.key)
        layers.append((*_addresses(blob, offsets), flat.data_ptr() + start * size, n, scales))
    sizes = rows.shape[1], rows.shape[0], rows.stride(0)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().awq_linears_sm80(layers, sizes, rows.data_ptr(), DTYPES[flat.dtype], stream))
