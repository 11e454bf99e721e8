"""The engine's arithmetic: 4-bit linears on packed weights. Letters: M tokens, N outputs, K inputs, R rank.

    weight = CanonicalLinear(codes, wscales, ...)            # plain tensors, as on disk
    packed = pack(weight, backends.select("cpu").name)       # tiled for the machine
    y = svdq_linear(x, packed, "int8")                       # (..., K) -> (..., N)

Each op is defined in reference.py and registered as torch.ops.nibble.*. Importing this package touches no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import ArgumentError
from engine.ops import backends, cuda, schema, sm80, widening
from engine.ops.attention import attention_8bit, in_8bit
from engine.ops.canonical import AwqWeight, CanonicalLinear, dequantize, dequantize_awq
from engine.ops.heads import project_heads, projects_heads, rotate_heads
from engine.ops.layout import PackedAwq, PackedLinear, pack, pack_awq, unpack, unpack_awq
from engine.ops.passes import gated_add
from engine.ops.reference import GELU_SHIFT, MODES, QuantizedAct, act_layout
from engine.ops.sana import depthwise_glu, linear_attention

__all__ = [
    "GELU_SHIFT",
    "MODES",
    "AwqWeight",
    "CanonicalLinear",
    "PackedAwq",
    "PackedLinear",
    "QuantizedAct",
    "add_linear_",
    "add_product_",
    "adds_at_once",
    "attention_8bit",
    "awq_linear",
    "awq_linears",
    "backends",
    "depthwise_glu",
    "dequantize",
    "dequantize_awq",
    "drop_wide",
    "gated_add",
    "in_8bit",
    "keep_wide",
    "linear",
    "linear_attention",
    "norm_quantize",
    "pack",
    "pack_awq",
    "project_heads",
    "projects_heads",
    "quantize_act",
    "quantize_tokens",
    "rotate_heads",
    "schema",
    "svdq_linear",
    "unpack",
    "unpack_awq",
]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_quantize_act = torch.ops.nibble.quantize_act.default
_norm_quantize = torch.ops.nibble.norm_quantize.default
_linear = torch.ops.nibble.linear.default
_svdq_linear = torch.ops.nibble.svdq_linear.default
_add_linear = torch.ops.nibble.add_linear_.default
_awq_linear = torch.ops.nibble.awq_linear.default
_awq_linears = torch.ops.nibble.awq_linears.default


def quantize_act(x: Tensor, packed: PackedLinear, mode: str, pairs: bool = False) -> QuantizedAct:
    """Smooth and quantize tokens, and take their low-rank projection, in one pass over x (..., K) of any strides.

    mode "int8": one scale a token; "int4": one a token and 64 inputs, codes -8..7; "uint4": the same for GELU
    outputs, lifted by GELU_SHIFT, codes 0..15; "fp8": e4m3, one scale a token, for Hopper; "nvfp4": e2m1, an e4m3 scale
    a token and 16 inputs, for consumer Blackwell. Tokens are flattened to M. The low-rank projection sees x as it is.
    `pairs` lets a backend that multiplies such (sm80) give 4-bit codes two a byte, for `linear` alone
    (engine/ops/sm80.py).
    Raises ArgumentError for a wrong shape, dtype, device or mode; BackendError if the backend cannot run here.
    """
    _check_tokens(x, packed)
    _check_mode(mode, packed.backend)
    return QuantizedAct(*_quantize_act(x, packed.blob, packed.spec.key, mode, pairs))


def norm_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, layers: Sequence[PackedLinear], mode: str
) -> list[QuantizedAct]:
    """quantize_act of LayerNorm(x) * (1 + scale) + shift, for one or two layers that read the same tokens.

    x (B, T, K), scale and shift (B, K). On sm90a it is one pass over x, and the projections come in bfloat16.
    Raises ArgumentError and BackendError as quantize_act does.
    """
    if not 1 <= len(layers) <= 2:
        raise ArgumentError(f"layers: expected one or two, got {len(layers)}")
    for packed in layers:
        _check_tokens(x, packed)
        _check_mode(mode, packed.backend)
    for name, value in (("scale", scale), ("shift", shift)):
        if x.dim() != 3 or tuple(value.shape) != (x.shape[0], x.shape[2]):
            raise ArgumentError(
                f"{name}: expected (B, K) beside x of (B, T, K), got {tuple(value.shape)} beside {tuple(x.shape)}"
            )
    blobs, specs = [packed.blob for packed in layers], [packed.spec.key for packed in layers]
    parts = _norm_quantize(x, scale, shift, eps, blobs, specs, mode)
    return [QuantizedAct(*parts[i : i + 3]) for i in range(0, len(parts), 3)]


def linear(act: QuantizedAct, packed: PackedLinear, out_dtype: torch.dtype | None = None, gelu: bool = False) -> Tensor:
    """Quantized tokens -> y (M, N): integer dots of 64 inputs, scales, low-rank branch, bias; sums in fp32.

    `out_dtype` defaults to packed.dtype; `gelu` as in svdq_linear. Raises ArgumentError if `act` does not fit
    `packed`; BackendError as above.
    """
    mode, fitting = _fitting(act, packed)
    for name, (shapes, dtypes) in fitting.items():
        tensor = getattr(act, name)
        if tuple(tensor.shape) not in shapes:
            raise ArgumentError(
                f"act.{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in dtypes or tensor.device != packed.blob.device:
            raise ArgumentError(
                f"act.{name}: expected {' or '.join(map(str, dtypes))} on {packed.blob.device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    _check_mode(mode, packed.backend)
    out_dtype = out_dtype or packed.dtype
    if out_dtype not in _FLOATS:
        raise ArgumentError(f"out_dtype: expected bfloat16, float16 or float32, got {out_dtype}")
    return _linear(act.codes, act.scales, act.low_rank, packed.blob, packed.spec.key, out_dtype, gelu)


def svdq_linear(x: Tensor, packed: PackedLinear, mode: str, gelu: bool = False) -> Tensor:
    """x (..., K) of any strides -> y (..., N) in the dtype of x: quantize_act and linear in one call.

    `gelu` applies GELU in its tanh form to the result, without a pass of its own on sm90a and sm120a (before the result
    is rounded) and on sm80.

    Raises ArgumentError and BackendError as quantize_act does.
    """
    _check_tokens(x, packed)
    _check_mode(mode, packed.backend)
    return _svdq_linear(x, packed.blob, packed.spec.key, mode, gelu)


def add_linear_(x: Tensor, gate: Tensor, y: Tensor, packed: PackedLinear, mode: str) -> None:
    """x += gate * svdq_linear(y, packed, mode) in place: x (B, T, N), gate (B, N), y (B, T, K).

    On sm90a and sm80 the product is added where it is written, without a pass of its own. Raises ArgumentError and
    BackendError as quantize_act does.
    """
    _check_tokens(y, packed)
    _check_mode(mode, packed.backend)
    for name, value, shape in (("x", x, (*y.shape[:-1], packed.n)), ("gate", gate, (len(y), packed.n))):
        if y.dim() != 3 or tuple(value.shape) != shape:
            raise ArgumentError(
                f"{name}: expected {shape} beside y of (B, T, K) and N = {packed.n}, got {tuple(value.shape)}"
            )
    _add_linear(x, gate, y, packed.blob, packed.spec.key, mode)


def quantize_tokens(x: Tensor, packed: PackedLinear, mode: str) -> QuantizedAct:
    """quantize_act as norm_quantize gives it, low_rank in bfloat16: for a layer of backend sm90a.

    Raises ArgumentError and BackendError as quantize_act does.
    """
    _check_tokens(x, packed)
    _check_mode(mode, _on_hopper(packed))
    return cuda.quantize_tokens(x, packed.blob, packed.spec)


def add_product_(x: Tensor, gate: Tensor, act: QuantizedAct, packed: PackedLinear) -> None:
    """add_linear_ of tokens (B T, K) that quantize_tokens or norm_quantize gave: x (B, T, N), gate (B, N).

    For what adds_at_once accepts, on backend sm90a. Raises ArgumentError and BackendError as linear does.
    """
    _on_hopper(packed)
    if tuple(act.codes.shape) != (x.shape[:-1].numel(), packed.k) or x.shape[-1] != packed.n:
        raise ArgumentError(
            f"act: expected codes (B T, {packed.k}) beside x of (B, T, {packed.n}), got {tuple(act.codes.shape)}"
            f" beside {tuple(x.shape)}"
        )
    if not adds_at_once(x, gate, packed):
        raise ArgumentError("x: expected dense bfloat16 tokens that adds_at_once accepts")
    cuda.add_product_(x, gate, act, packed.blob, packed.spec)


def _on_hopper(packed: PackedLinear) -> str:
    if packed.backend != "sm90a":
        raise ArgumentError(f"packed: expected a layer of backend sm90a, got {packed.backend}")
    return packed.backend


def adds_at_once(x: Tensor, gate: Tensor, packed: PackedLinear) -> bool:
    """Whether add_linear_ takes no pass of its own over x (B, T, N) and gate (B, N)."""
    return cuda.can_add(x, gate, packed.spec)


def keep_wide(packed: PackedLinear) -> Tensor | None:
    """Keep a layer's weights in e4m3 as long as its buffer lives, instead of widening them for each product anew.

    That is what Hopper's product for many tokens multiplies. Returns those bytes: as many as the layer has weights, and
    64 ranks' more. None on other backends, which need no such thing.
    """
    return widening.keep(packed.blob, packed.spec) if packed.backend == "sm90a" else None


def drop_wide(packed: PackedLinear) -> None:
    """Undo keep_wide."""
    widening.drop(packed.blob)


def awq_linear(x: Tensor, packed: PackedAwq) -> Tensor:
    """x (..., K) of any strides -> y (..., N) in the dtype of x; only the weights are quantized (W4A16).

    Made for few tokens. Raises ArgumentError and BackendError as quantize_act does.
    """
    _check_tokens(x, packed)
    return _awq_linear(x, packed.blob, packed.spec.key)


def awq_linears(x: Tensor, layers: Sequence[PackedAwq]) -> list[Tensor]:
    """awq_linear of each layer for the same x (..., K), bit for bit; on CUDA in one launch, for few tokens.

    The outputs (..., N) are dense parts of one buffer. Raises ArgumentError and BackendError as quantize_act does.
    """
    for packed in layers:
        _check_tokens(x, packed)
    if not layers:
        return []
    specs = [packed.spec.key for packed in layers]
    flat, m = _awq_linears(x, [packed.blob for packed in layers], specs), x.numel() // x.shape[-1]
    starts = schema.awq_starts(m, specs)
    return [
        flat[start : start + m * packed.n].view(*x.shape[:-1], packed.n)
        for packed, start in zip(layers, starts, strict=False)
    ]


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


def _fitting(
    act: QuantizedAct, packed: PackedLinear
) -> tuple[str, dict[str, tuple[list[tuple[int, ...]], list[torch.dtype]]]]:
    """The mode of `act`, "int8" for every integer one, and the shapes and types that `packed` allows its parts.

    NVFP4 tokens are known by the type of their scales, pairs of 4-bit codes (sm80.py) by their three dimensions.
    """
    k, fp8 = packed.k, torch.float8_e4m3fn
    mode = "nvfp4" if act.scales.dtype == fp8 else "fp8" if act.codes.dtype == fp8 else "int8"
    pairs = mode == "int8" and packed.backend == "sm80" and act.codes.dim() == 3 and act.scales.dim() == 2
    m = (act.scales if pairs else act.codes).shape[0]
    fitting = {name: ([(m, *shape)], [dtype]) for name, (dtype, shape) in act_layout(mode, k).items()}
    fitting["low_rank"] = [(m, packed.rank)], [torch.float32]
    if mode == "fp8":
        fitting["low_rank"][1].append(torch.bfloat16)  # of norm_quantize
    if mode == "int8":
        fitting["scales"][0].append((m, k // 64))  # of 4-bit codes
    if pairs:
        fitting["codes"] = [sm80.pairs_shape(m, k)], [torch.int8, torch.uint8]
    return mode, fitting
