"""The ops as torch knows them: torch.ops.nibble.*, with shapes for torch.compile.

A packed layer travels as its one buffer and the key of its Spec. Library.define and impl, not custom_op: 2 us less a
call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import cpu, cuda, reference, sm80, sm120a
from engine.ops.layout import PackedAwq, PackedLinear, unpack, unpack_awq
from engine.ops.reference import QuantizedAct
from engine.ops.spec import Spec, parse

_library = torch.library.Library("nibble", "DEF")
_library.define("quantize_act(Tensor x, Tensor blob, str spec, str mode, bool pairs=False) -> (Tensor, Tensor, Tensor)")
_library.define(
    "linear(Tensor codes, Tensor scales, Tensor low_rank, Tensor blob, str spec, ScalarType out_dtype, bool gelu=False)"
    " -> Tensor"
)
_library.define(
    "norm_quantize(Tensor x, Tensor scale, Tensor shift, float eps, Tensor[] blobs, str[] specs, str mode) -> Tensor[]"
)
_library.define("svdq_linear(Tensor x, Tensor blob, str spec, str mode, bool gelu=False) -> Tensor")
_library.define("add_linear_(Tensor(a!) x, Tensor gate, Tensor y, Tensor blob, str spec, str mode) -> ()")
_library.define("awq_linear(Tensor x, Tensor blob, str spec) -> Tensor")
_library.define("awq_linears(Tensor x, Tensor[] blobs, str[] specs) -> Tensor")


def _reference_quantize(x: Tensor, blob: Tensor, spec: Spec, mode: str) -> QuantizedAct:
    weight = unpack(PackedLinear(blob, spec, x.dtype))
    return reference.quantize_act(x.reshape(-1, spec.k), weight.smooth, weight.lora_down, mode)


def _reference_linear(act: QuantizedAct, blob: Tensor, spec: Spec, out_dtype: torch.dtype) -> Tensor:
    return reference.linear(act, unpack(PackedLinear(blob, spec, out_dtype))).to(out_dtype)


def _compiled(spec: Spec) -> ModuleType:
    """The module that calls the kernels of a layer's backend."""
    return {"sm90a": cuda, "sm80": sm80, "sm120a": sm120a}.get(spec.backend, cpu)


def _quantize_act(x: Tensor, blob: Tensor, spec: str, mode: str, pairs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse(spec)
    if parsed.backend == "sm80":
        codes, scales, low_rank = sm80.quantize_act(x, blob, parsed, mode, pairs)
        return codes, scales, low_rank
    run = _reference_quantize if parsed.backend == "reference" else _compiled(parsed).quantize_act
    codes, scales, low_rank = run(x, blob, parsed, mode)
    return codes, scales, low_rank


def _norm_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, blobs: list[Tensor], specs: list[str], mode: str
) -> list[Tensor]:
    targets = [(blob, parse(spec)) for blob, spec in zip(blobs, specs, strict=True)]
    if all(spec.backend == "sm90a" for _, spec in targets):
        return [part for act in cuda.norm_quantize(x, scale, shift, eps, targets) for part in act]
    normed = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return [part for blob, spec in zip(blobs, specs, strict=True) for part in _quantize_act(normed, blob, spec, mode)]


def _linear(
    codes: Tensor, scales: Tensor, low_rank: Tensor, blob: Tensor, spec: str, out_dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    parsed, act = parse(spec), QuantizedAct(codes, scales, low_rank)
    if parsed.backend in ("sm90a", "sm80", "sm120a"):  # whose kernels apply GELU
        return _compiled(parsed).linear(act, blob, parsed, out_dtype, gelu)
    run = _reference_linear if parsed.backend == "reference" else _compiled(parsed).linear
    y = run(act, blob, parsed, out_dtype)
    return F.gelu(y, approximate="tanh") if gelu else y


def _svdq_linear(x: Tensor, blob: Tensor, spec: str, mode: str, gelu: bool = False) -> Tensor:
    parsed = parse(spec)
    if parsed.backend in ("sm90a", "sm80", "sm120a"):
        return _compiled(parsed).svdq_linear(x, blob, parsed, mode, gelu)
    if parsed.backend != "reference":
        y = _compiled(parsed).svdq_linear(x, blob, parsed, mode)
    else:
        act = _reference_quantize(x, blob, parsed, mode)
        y = _reference_linear(act, blob, parsed, x.dtype).view(*x.shape[:-1], parsed.n)
    return F.gelu(y, approximate="tanh") if gelu else y


def _add_linear(x: Tensor, gate: Tensor, y: Tensor, blob: Tensor, spec: str, mode: str) -> None:
    parsed = parse(spec)
    if cuda.can_add(x, gate, parsed):
        _compiled(parsed).add_linear_(x, gate, y, blob, parsed, mode)
    else:
        x.copy_(torch.ops.nibble.gated_add.default(x, gate, _svdq_linear(y, blob, spec, mode)))


def _awq_linear(x: Tensor, blob: Tensor, spec: str) -> Tensor:
    parsed = parse(spec)
    if parsed.backend != "reference":
        return (sm80 if parsed.backend == "sm80" else cpu).awq_linear(x, blob, parsed)
    weight = unpack_awq(PackedAwq(blob, parsed, x.dtype))
    return reference.awq_linear(x.reshape(-1, parsed.k), weight).to(x.dtype).view(*x.shape[:-1], parsed.n)


def awq_starts(m: int, specs: Sequence[str]) -> list[int]:
    """Where each layer's outputs (M, N) begin in what awq_linears gives, on borders of 64 elements; at last the end."""
    sizes = (-(-m * parse(spec).n // 64) * 64 for spec in specs)
    return list(itertools.accumulate(sizes, initial=0))


def _awq_linears(x: Tensor, blobs: list[Tensor], specs: list[str]) -> Tensor:
    parsed, starts = [parse(spec) for spec in specs], awq_starts(x.numel() // x.shape[-1], specs)
    if all(spec.backend == "sm80" for spec in parsed) and x.numel() < sm80.DENSE_FROM * x.shape[-1]:
        flat = x.new_empty(starts[-1])
        sm80.awq_linears_(flat, starts[:-1], x, blobs, parsed)
        return flat
    flat = x.new_zeros(starts[-1])
    for blob, spec, start in zip(blobs, specs, starts, strict=False):
        y = _awq_linear(x, blob, spec)
        flat[start : start + y.numel()] = y.flatten()
    return flat


for _name, _run in (
    ("quantize_act", _quantize_act), ("norm_quantize", _norm_quantize), ("linear", _linear),
    ("svdq_linear", _svdq_linear), ("add_linear_", _add_linear), ("awq_linear", _awq_linear),
    ("awq_linears", _awq_linears)
):  # fmt: skip
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)


@torch.library.register_fake("nibble::quantize_act", lib=_library)
def _(x: Tensor, blob: Tensor, spec: str, mode: str, pairs: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    parsed = parse(spec)
    m, k = x.numel() // parsed.k, parsed.k
    layout = reference.act_layout(mode, k)
    codes, scales = (x.new_empty((m, *shape), dtype=dtype) for dtype, shape in layout.values())
    if pairs and parsed.backend == "sm80" and mode != "int8":
        codes = x.new_empty(sm80.pairs_shape(m, k), dtype=torch.uint8 if mode == "uint4" else torch.int8)
    return codes, scales, x.new_empty((m, parsed.rank), dtype=torch.float32)


@torch.library.register_fake("nibble::norm_quantize", lib=_library)
def _(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, blobs: list[Tensor], specs: list[str], mode: str
) -> list[Tensor]:
    found = []
    for blob, spec in zip(blobs, specs, strict=True):
        codes, scales, low_rank = torch.ops.nibble.quantize_act.default(x, blob, spec, mode)
        found += [codes, scales, low_rank.to(torch.bfloat16) if parse(spec).backend == "sm90a" else low_rank]
    return found


@torch.library.register_fake("nibble::linear", lib=_library)
def _(
    codes: Tensor, scales: Tensor, low_rank: Tensor, blob: Tensor, spec: str, out_dtype: torch.dtype, gelu: bool = False
) -> Tensor:
    return codes.new_empty((scales.shape[0], parse(spec).n), dtype=out_dtype)


@torch.library.register_fake("nibble::svdq_linear", lib=_library)
def _(x: Tensor, blob: Tensor, spec: str, mode: str, gelu: bool = False) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(spec).n))


@torch.library.register_fake("nibble::add_linear_", lib=_library)
def _(x: Tensor, gate: Tensor, y: Tensor, blob: Tensor, spec: str, mode: str) -> None:
    return None


@torch.library.register_fake("nibble::awq_linear", lib=_library)
def _(x: Tensor, blob: Tensor, spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], parse(spec).n))


@torch.library.register_fake("nibble::awq_linears", lib=_library)
def _(x: Tensor, blobs: list[Tensor], specs: list[str]) -> Tensor:
    return x.new_empty(awq_starts(x.numel() // x.shape[-1], specs)[-1])
