"""Calls the CUDA kernels for consumer Blackwell (RTX 50): NVFP4 weights and NVFP4 tokens, natively multiplied.

They are compiled and were checked by emulation; no such card was at hand. Tokens are read in the type of the layer's
low-rank factors, or without those in their own, float32 as bfloat16.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ArgumentError
from engine.ops.calls import DTYPES, check, kernels
from engine.ops.reference import QuantizedAct
from engine.ops.spec import Spec, parse

__all__ = ["linear", "quantize_act", "svdq_linear"]

_PARTS = ("codes", "scales", "up", "down", "inv_smooth", "bias", "factor")
_SCALES = 16  # bytes of a token's scales that a kernel reads at once


@lru_cache(maxsize=4096)
def _offsets(key: str) -> tuple[int, ...]:
    """Byte offsets of a layer's parts. Cached as in cpu.py."""
    parts = parse(key).sections
    return tuple(parts[name].offset for name in _PARTS)


def _weight(blob: Tensor, spec: Spec, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A layer's WeightFp4 in csrc/cuda/kernels.h: addresses and sizes."""
    base = blob.data_ptr()
    return tuple(base + offset for offset in _offsets(spec.key)), (spec.n, spec.k, spec.rank, DTYPES[dtype])


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (..., K) as (M, K) of `dtype` whose rows begin on 16-byte borders; copies only where it must."""
    rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).to(dtype)
    aligned = rows.stride(1) == 1 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
    return rows if aligned else rows.clone(memory_format=torch.contiguous_format)


def _quantize(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """As quantize_act, but for scales (M, K/16 rounded up to 16), whose last columns hold nothing."""
    if mode != "nvfp4":
        raise ArgumentError(f"mode: expected nvfp4 on backend sm120a, got {mode!r}")
    own = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    dtype, where = spec.sections["up"].dtype if spec.rank else own, x.device
    rows = _rows(x, dtype)
    m, pitch = len(rows), -(-spec.k // 16 // _SCALES) * _SCALES
    act = QuantizedAct(
        torch.empty((m, spec.k // 2), dtype=torch.uint8, device=where),
        torch.empty((m, pitch), dtype=torch.float8_e4m3fn, device=where),
        torch.empty((m, spec.rank), dtype=torch.float32, device=where),
    )
    with torch.cuda.device(where):
        stream = torch.cuda.current_stream().cuda_stream
        counts, addresses = (m, rows.stride(0), pitch), (part.data_ptr() for part in act)
        check(kernels().quantize_act_sm120a(*_weight(blob, spec, dtype), rows.data_ptr(), counts, *addresses, stream))
    return act


def _multiply(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype, gelu: bool) -> Tensor:
    """y (M, N) of what _quantize returns."""
    m, pitch = act.scales.shape
    y = torch.empty((m, spec.n), dtype=out_dtype, device=blob.device)
    with torch.cuda.device(blob.device):
        stream = torch.cuda.current_stream().cuda_stream
        weight, addresses = _weight(blob, spec, spec.sections["up"].dtype), (part.data_ptr() for part in act)
        out = y.data_ptr(), DTYPES[out_dtype]
        check(kernels().linear_sm120a(*weight, *addresses, (m, pitch), *out, gelu, stream))
    return y


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """x (..., K) -> codes (M, K/2) uint8, scales (M, K/16) e4m3, low_rank (M, R) fp32."""
    act = _quantize(x, blob, spec, mode)
    return act._replace(scales=act.scales[:, : spec.k // 16].contiguous())


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype, gelu: bool = False) -> Tensor:
    """Quantized tokens -> y (M, N). The projection is multiplied in the factors' type, as the published kernels do."""
    codes, scales, low_rank = act
    scales = F.pad(scales.view(torch.uint8), (0, -scales.shape[1] % _SCALES)).view(torch.float8_e4m3fn)
    act = QuantizedAct(codes.contiguous(), scales.contiguous(), low_rank.float().contiguous())
    return _multiply(act, blob, spec, out_dtype, gelu)


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x: quantize_act, linear and, if wanted, GELU in its tanh form."""
    return _multiply(_quantize(x, blob, spec, mode), blob, spec, x.dtype, gelu).view(*x.shape[:-1], spec.n)
