"""Calls the compiled CUDA kernels: allocates with torch, passes addresses and the stream, raises what they answer.

Backend "sm90a" (H100, H200): W4A8 with e4m3 tokens (mode "fp8"). sm80.py calls those for other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from engine.errors import ArgumentError, BackendError
from engine.ops.backends import cuda_kernels
from engine.ops.reference import QuantizedAct
from engine.ops.spec import Spec

__all__ = [
    "Heads",
    "add_linear_",
    "can_add",
    "check",
    "drop_wide",
    "keep_wide",
    "kernels",
    "linear",
    "linear_heads_",
    "norm_quantize",
    "quantize_act",
    "svdq_linear",
]

# From so many tokens on a product is faster with weights that were widened to 8 bits first (csrc/cuda/sm90a/widen.cuh).
WIDE_FROM = 1024
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # enum DType in csrc/ops.h


class Heads(NamedTuple):
    """What becomes of queries and keys where they are projected: members of LinearFp8 in csrc/cuda/kernels.h."""

    angles: Tensor  # (positions, 64, 2) float16
    norm_q: Tensor  # (128) bfloat16
    norm_k: Tensor
    eps: float
    heads: int
    tokens: int  # of a sample
    first: int  # position of a sample's first token


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


def _quantize(
    x: Tensor, targets: Sequence[tuple[Tensor, Spec]], norm: tuple[Tensor, Tensor, float] | None = None,
    *, form: int = 0,
) -> list[QuantizedAct]:  # fmt: skip
    """Codes (M, K) e4m3, scales (M) fp32 and low_rank (M, R) bfloat16 for each of one or two packed layers.

    `form` is a QuantizeForm of csrc/cuda/kernels.h; 0 chooses.
    """
    rows, where = _rows(x), x.device
    m, k = rows.shape
    made, addresses = [], []
    for blob, spec in targets:
        act = QuantizedAct(
            torch.empty((m, k), dtype=torch.float8_e4m3fn, device=where),
            torch.empty(m, dtype=torch.float32, device=where),
            torch.empty((m, spec.rank), dtype=torch.bfloat16, device=where),
        )
        inputs = (blob.data_ptr() + spec.sections[name].offset for name in ("inv_smooth", "down"))
        addresses.append(((*inputs, *(part.data_ptr() for part in act)), spec.rank))
        made.append(act)
    modulation, eps = None, 0.0
    if norm is not None:
        # Both are rows of one modulation as a rule: no copy then.
        scale, shift = (part if part.stride(-1) == 1 and part.data_ptr() % 16 == 0 else part.contiguous()
                        for part in (value.to(torch.bfloat16) for value in norm[:2]))  # fmt: skip
        if scale.stride(0) != shift.stride(0) or scale.stride(0) % 8:
            scale, shift = scale.contiguous(), shift.contiguous()
        modulation, eps = (scale.data_ptr(), shift.data_ptr(), scale.stride(0), scale.shape[0]), norm[2]
    with torch.cuda.device(where):
        stream = torch.cuda.current_stream().cuda_stream
        where_from = rows.data_ptr(), m, k, rows.stride(0)
        check(kernels().quantize_fp8_sm90a(*where_from, addresses, modulation, eps, stream, form))
    return made


def _only_fp8(mode: str) -> None:
    if mode != "fp8":
        raise ArgumentError(f"mode: expected fp8 on backend sm90a, got {mode!r}")


def _widen(act: QuantizedAct, blob: Tensor, spec: Spec) -> Tensor:
    """The weights in e4m3 and the up-projection in their units, or nothing where that does not pay."""
    if (found := _wide.get(blob) if len(_wide) else None) is not None:
        return found
    # NVFP4 has groups of 16, which the product for few tokens does not know.
    pays = len(act.codes) >= WIDE_FROM or "raw_most" in spec.sections
    return widened(blob, spec) if pays and len(act.codes) else blob.new_empty(0)


def widened(blob: Tensor, spec: Spec) -> Tensor:
    """What a product for many tokens reads of a layer: N K bytes, and N 128 for each 64 ranks."""
    parts, base = spec.sections, blob.data_ptr()
    n, k = (size * 64 for size in parts["codes"].shape[:2])
    nvfp4 = "raw_most" in parts
    wide = torch.empty(n * k + -(-spec.rank // 64) * n * 128, dtype=torch.uint8, device=blob.device)
    names = ("codes", "scales", "raw_most" if nvfp4 else "row_most", "up", "row_most")
    addresses = (*(base + parts[name].offset for name in names), wide.data_ptr())
    with torch.cuda.device(blob.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().widen_fp8_sm90a(addresses, (n, k, spec.rank), _scale_dtype(spec), nvfp4, stream))
    return wide


# What is kept of layers whose weights shall not be widened for every product again, by their buffers.
_wide: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep_wide(blob: Tensor, spec: Spec) -> Tensor:
    """Widen the weights of a layer once and for all; the result lives as long as `blob`, or until drop_wide."""
    _wide[blob] = wide = widened(blob, spec)
    return wide


def drop_wide(blob: Tensor) -> None:
    """Undo keep_wide."""
    _wide.pop(blob, None)


def _multiply(
    act: QuantizedAct, wide: Tensor, blob: Tensor, spec: Spec, out_dtype: torch.dtype,
    *, gelu: bool = False, tile: int = 0, out: Tensor | None = None, gate: Tensor | None = None,
    heads: Heads | None = None,
) -> Tensor:  # fmt: skip
    """y (M, N), in `out` where that is given; with a gate (B, N), out (B, T, N) += gate * y."""
    codes, scales, low_rank = act
    parts, m = spec.sections, codes.shape[0]
    y = torch.empty((m, spec.n), dtype=out_dtype, device=codes.device) if out is None else out
    gates = None if gate is None else (gate.data_ptr(), gate.stride(0), y.shape[1])
    turned = None
    if heads is not None:
        turned = (*(part.data_ptr() for part in heads[:3]), *heads[4:]), heads.eps
    base = blob.data_ptr()
    weights = tuple(base + parts[name].offset for name in ("codes", "scales", "row_most", "up", "bias"))
    blocks = parts["codes"].shape
    sizes = (m, blocks[0] * 64, blocks[1] * 64, spec.n, spec.k, spec.rank)
    tokens = (codes.data_ptr(), scales.data_ptr(), low_rank.data_ptr(), y.data_ptr())
    addresses = (*weights, *tokens, wide.data_ptr() if wide.numel() else 0)
    with torch.cuda.device(codes.device):
        stream = torch.cuda.current_stream().cuda_stream
        types = _scale_dtype(spec), DTYPES[out_dtype]
        check(kernels().linear_fp8_sm90a(addresses, sizes, *types, gelu, tile, gates, turned, stream))
    return y


def _scale_dtype(spec: Spec) -> int:
    # Of 16-bit scales; a kernel for NVFP4 does not ask.
    return DTYPES.get(spec.sections["scales"].dtype, 0)


def quantize_act(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    """x (..., K) -> codes (M, K) e4m3, scales (M), low_rank (M, R) fp32."""
    _only_fp8(mode)
    codes, scales, low_rank = _quantize(x, [(blob, spec)])[0]
    return QuantizedAct(codes, scales, low_rank.float())


def norm_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, targets: Sequence[tuple[Tensor, Spec]]
) -> list[QuantizedAct]:
    """LayerNorm of x (B, T, K), modulated by scale and shift (B, K), for one or two layers; low_rank in bfloat16."""
    return _quantize(x, targets, (scale, shift, eps))


def linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype, gelu: bool = False) -> Tensor:
    """Quantized tokens -> y (M, N). The projection is multiplied in bfloat16, as the published kernels do."""
    codes, scales, low_rank = act
    act = QuantizedAct(codes.contiguous(), scales.contiguous(), low_rank.to(torch.bfloat16).contiguous())
    return _multiply(act, _widen(act, blob, spec), blob, spec, out_dtype, gelu=gelu)


def svdq_linear(x: Tensor, blob: Tensor, spec: Spec, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) -> y (..., N) in the dtype of x: quantize_act, linear and, if wanted, GELU in its tanh form."""
    _only_fp8(mode)
    y = linear(_quantize(x, [(blob, spec)])[0], blob, spec, x.dtype, gelu)
    return y.view(*x.shape[:-1], spec.n)


def can_add(x: Tensor, gate: Tensor, spec: Spec) -> bool:
    """Whether add_linear_, here or in sm80.py, takes x and gate: on Hopper a tile of tokens has one sample's gates."""
    if spec.backend not in ("sm90a", "sm80"):
        return False
    whole = x.dtype == gate.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[2] % 8 == 0
    fits = spec.backend == "sm80" or x.shape[0] == 1 or x.shape[1] % 128 == 0
    return whole and fits and gate.stride(1) == 1


def add_linear_(x: Tensor, gate: Tensor, y: Tensor, blob: Tensor, spec: Spec, mode: str) -> None:
    """x (B, T, N) += gate (B, N) * linear(y (B, T, K)), both bfloat16; the product is rounded, then the sum."""
    _only_fp8(mode)
    act = _quantize(y, [(blob, spec)])[0]
    _multiply(act, _widen(act, blob, spec), blob, spec, torch.bfloat16, out=x, gate=gate)


def linear_heads_(out: Tensor, act: QuantizedAct, blob: Tensor, spec: Spec, heads: Heads) -> None:
    """out (B, T, 3 H 128) <- queries, keys and values of B T tokens; of many samples, dense."""
    act = act._replace(low_rank=act.low_rank.to(torch.bfloat16))
    _multiply(act, _widen(act, blob, spec), blob, spec, torch.bfloat16, out=out, heads=heads)
