"""Calls the CUDA kernels for Ampere and everything after it: W4A4 and W4A8 by integers, and the weight-only linear.

They read the layout of the CPU kernels ("panel16"), and give the CPU's codes and scales bit for bit. Between
quantize_act and linear 4-bit codes travel in pairs, two a byte as the weights' do: codes (M, K/2) int8, or uint8 where
the mode is "uint4".
"""

from __future__ import annotations

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

__all__ = ["add_linear_", "awq_linear", "linear", "quantize_act", "svdq_linear"]

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


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str, pairs: bool = False) -> QuantizedAct:
    """x (..., K) -> codes (M, K) int8, scales (M) or (M, K/64), low_rank (M, R) fp32; with `pairs`, 4-bit codes so."""
    rows, where = _rows(x), x.device
    m, (offsets, sizes) = rows.shape[0], _layer(spec.key)
    pairs = pairs and mode != "int8"
    codes = torch.empty(
        (m, spec.k // 2 if pairs else spec.k),
        dtype=torch.uint8 if pairs and mode == "uint4" else torch.int8, device=where,
    )  # fmt: skip
    scales = torch.empty(m if mode == "int8" else (m, spec.k // 64), dtype=torch.float32, device=where)
    low_rank = torch.empty((m, spec.rank), dtype=torch.float32, device=where)
    with torch.cuda.device(where):
        check(kernels().quantize_act_sm80(
            _addresses(blob, offsets), sizes, rows.data_ptr(), DTYPES[rows.dtype], rows.stride(0), m, MODES[mode],
            pairs, (codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr()), torch.cuda.current_stream().cuda_stream,
        ))  # fmt: skip
    return QuantizedAct(codes, scales, low_rank)


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype, gelu: bool = False) -> Tensor:
    """Quantized tokens -> y (M, N)."""
    y = torch.empty((act.codes.shape[0], spec.n), dtype=out_dtype, device=blob.device)
    _multiply(act, blob, spec, y, gelu=gelu)
    return y


def _multiply(
    act: QuantizedAct, blob: Tensor, spec: Spec, y: Tensor, *, gelu: bool = False, gate: Tensor | None = None,
    form: int = 0,
) -> None:  # fmt: skip
    """y (M, N) <- the product; with a gate (B, N), y (B, T, N) += gate * product.

    `form` is a ProductForm of csrc/cuda/kernels.h; 0 chooses.
    """
    codes, scales, low_rank = (t.contiguous() for t in act)
    codes = codes if codes.data_ptr() % 16 == 0 else codes.clone()
    m, (offsets, sizes) = codes.shape[0], _layer(spec.key)
    mode = "int8" if scales.dim() == 1 else "uint4" if codes.dtype == torch.uint8 else "int4"
    gates = None if gate is None else (gate.data_ptr(), gate.stride(0), y.shape[1])
    with torch.cuda.device(codes.device):
        check(kernels().linear_sm80(
            _addresses(blob, offsets), sizes, (codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), y.data_ptr()),
            m, MODES[mode], codes.shape[1] != spec.k, DTYPES[y.dtype], gelu, gates, form,
            torch.cuda.current_stream().cuda_stream,
        ))  # fmt: skip


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x: quantize_act, linear and, if wanted, GELU of y in its tanh form."""
    act = quantize_act(x, blob, spec, mode, pairs=True)
    return linear(act, blob, spec, x.dtype, gelu).view(*x.shape[:-1], spec.n)


def add_linear_(x: Tensor, gate: Tensor, y: Tensor, blob: Tensor, spec: Spec, mode: str) -> None:
    """x (B, T, N) += gate (B, N) * linear(y (B, T, K)), both bfloat16; the product is rounded, then the sum."""
    _multiply(quantize_act(y, blob, spec, mode, pairs=True), blob, spec, x, gate=gate)


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
