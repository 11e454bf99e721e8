"""The engine's arithmetic: 4-bit linears on packed weights. Letters: M tokens, N outputs, K inputs, R rank.

    weight = CanonicalLinear(codes, wscales, ...)            # plain tensors, as on disk
    packed = pack(weight, backends.select("cpu").name)       # tiled for the machine
    y = svdq_linear(x, packed, "int8")                       # (..., K) -> (..., N)

Each op is defined in reference.py and registered as torch.ops.nibble.*. Importing this package touches no GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.errors import ArgumentError
from engine.ops import backends, schema
from engine.ops.canonical import AwqWeight, CanonicalLinear, dequantize, dequantize_awq
from engine.ops.layout import PackedAwq, PackedLinear, pack, pack_awq, unpack, unpack_awq
from engine.ops.reference import GELU_SHIFT, MODES, QuantizedAct

__all__ = [
    "GELU_SHIFT",
    "MODES",
    "AwqWeight",
    "CanonicalLinear",
    "PackedAwq",
    "PackedLinear",
    "QuantizedAct",
    "awq_linear",
    "backends",
    "dequantize",
    "dequantize_awq",
    "linear",
    "pack",
    "pack_awq",
    "quantize_act",
    "schema",
    "svdq_linear",
    "unpack",
    "unpack_awq",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_quantize_act = torch.ops.nibble.quantize_act.default
_linear = torch.ops.nibble.linear.default
_svdq_linear = torch.ops.nibble.svdq_linear.default
_awq_linear = torch.ops.nibble.awq_linear.default


def quantize_act(x: Tensor, packed: PackedLinear, mode: str) -> QuantizedAct:
    """Smooth and quantize tokens, and take their low-rank projection, in one pass over x (..., K) of any strides.

    mode "int8": one scale a token; "int4": one a token and 64 inputs, codes -8..7; "uint4": the same for GELU
    outputs, lifted by GELU_SHIFT, codes 0..15; "fp8": e4m3, one scale a token, for Hopper. Tokens are flattened to M.
    The low-rank projection sees x as it is.
    Raises ArgumentError for a wrong shape, dtype, device or mode; BackendError if the backend cannot run here.
    """
    _check_tokens(x, packed)
    _check_mode(mode, packed.backend)
    return QuantizedAct(*_quantize_act(x, packed.blob, packed.spec.key, mode))


def linear(act: QuantizedAct, packed: PackedLinear, out_dtype: torch.dtype | None = None) -> Tensor:
    """Quantized tokens -> y (M, N): integer dots of 64 inputs, scales, low-rank branch, bias; sums in fp32.

    `out_dtype` defaults to packed.dtype. Raises ArgumentError if `act` does not fit `packed`; BackendError as above.
    """
    m, k, out_dtype = act.codes.shape[0], packed.k, out_dtype or packed.dtype
    wanted = {"codes": ((m, k),), "scales": ((m,), (m, k // 64)), "low_rank": ((m, packed.rank),)}
    for name, shapes in wanted.items():
        tensor = getattr(act, name)
        if tuple(tensor.shape) not in shapes:
            raise ArgumentError(
                f"act.{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}"
            )
        dtype = torch.float32
        if name == "codes":
            dtype = torch.float8_e4m3fn if tensor.dtype == torch.float8_e4m3fn else torch.int8
        if tensor.dtype != dtype or tensor.device != packed.blob.device:
            raise ArgumentError(
                f"act.{name}: expected {dtype} on {packed.blob.device}, got {tensor.dtype} on {tensor.device}"
            )
    if out_dtype not in _FLOATS:
        raise ArgumentError(f"out_dtype: expected bfloat16, float16 or float32, got {out_dtype}")
    return _linear(act.codes, act.scales, act.low_rank, packed.blob, packed.spec.key, out_dtype)


def svdq_linear(x: Tensor, packed: PackedLinear, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) of any strides -> y (..., N) in the dtype of x: quantize_act and linear in one call.

    `gelu` applies GELU in its tanh form to the result; on sm90a before it is rounded, at no cost.

    Raises ArgumentError and BackendError as quantize_act does.
    """
    _check_tokens(x, packed)
    _check_mode(mode, packed.backend)
    return _svdq_linear(x, packed.blob, packed.spec.key, mode, gelu)


def awq_linear(x: Tensor, packed: PackedAwq) -> Tensor:
    """x (..., K) of any strides -> y (..., N) in the dtype of x; only the weights are quantized (W4A16).

    Made for few tokens. Raises ArgumentError and BackendError as quantize_act does.
    """
    _check_tokens(x, packed)
    return _awq_linear(x, packed.blob, packed.spec.key)


def _check_tokens(x: Tensor, packed: PackedLinear | PackedAwq) -> None:
    if x.dim() == 0 or x.shape[-1] != packed.spec.k:
        raise ArgumentError(f"x: expected {packed.k} inputs in the last dimension, got shape {tuple(x.shape)}")
    if x.dtype not in _FLOATS:
        raise ArgumentError(f"x: expected bfloat16, float16 or float32, got {x.dtype}")
    if x.device != packed.blob.device:
        raise ArgumentError(f"x: expected a tensor on {packed.blob.device}, as the weights are, got {x.device}")


def _check_mode(mode: str, backend: str) -> None:
    offered = tuple(MODES) if backend == "reference" else backends.modes(backend)
    if mode not in offered:
        raise ArgumentError(f"mode: expected {', '.join(offered)} on backend {backend}, got {mode!r}")
