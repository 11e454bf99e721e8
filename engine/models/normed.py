"""What stands beside a block's linears, taken along into their kernels: the norm before, what follows behind."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engine import ops
from engine.linear import SVDQuantLinear

__all__ = [
    "Projection",
    "added",
    "adds_in_place",
    "heads",
    "hooked",
    "normed",
    "owns_stream",
    "place_blocks",
    "ready",
    "step_blocks",
]


class Projection(NamedTuple):
    """A layer's output that is not multiplied out yet: what follows may be taken along into its kernel."""

    layer: Any
    tokens: Any  # (B, M, D), or what ops.norm_quantize or quantize_tokens made of them
    batch: int
    dtype: torch.dtype

    def value(self) -> Tensor:
        """The output (B, M, N)."""
        if isinstance(self.tokens, Tensor):
            return self.layer(self.tokens)
        return self.layer.multiply(self.tokens, self.dtype).unflatten(0, (self.batch, -1))


def normed(x: Tensor, scale: Tensor, shift: Tensor, norm: nn.LayerNorm, *layers: nn.Module) -> list[Projection]:
    """Each layer's output for norm(x) * (1 + scale) + shift; x (B, M, D), scale and shift (B, D)."""
    if all(isinstance(layer, SVDQuantLinear) and layer.backend == "sm90a" for layer in layers):
        quantized: Any = layers
        acts = ops.norm_quantize(x, scale, shift, norm.eps, [layer.packed for layer in quantized], quantized[0].mode)
        return [Projection(layer, act, len(x), x.dtype) for layer, act in zip(quantized, acts, strict=True)]
    normed = norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return [Projection(layer, normed, len(x), x.dtype) for layer in layers]


def heads(
    projections: Sequence[Projection], norms: Sequence[Any], rotary: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, T, H, D) of a joint sequence, text first: ops.rotate_heads of the projections.

    projections: of the text, if any, and of the picture; norms: of query and key of the picture, then of the text.
    """
    weights, eps, picture = [norm.weight for norm in norms], norms[0].eps, projections[-1]
    if all(_bare(one.layer) and not isinstance(one.tokens, Tensor) for one in projections):
        packed, acts = [one.layer.packed for one in projections], [one.tokens for one in projections]
        if ops.projects_heads(packed, rotary[0], picture.dtype, picture.batch):
            return ops.project_heads(acts, packed, weights, *rotary, eps, picture.batch)
    text = projections[0].value() if len(projections) == 2 else None
    return ops.rotate_heads(picture.value(), text, weights, *rotary, eps)


def ready(layer: Any, y: Tensor) -> Projection:
    """A layer beside its input y (B, M, D), quantized by now where its kernel takes it so."""
    tokens: Any = y
    if _bare(layer) and layer.backend == "sm90a" and not torch.compiler.is_compiling():
        tokens = ops.quantize_tokens(y, layer.packed, layer.mode)
    return Projection(layer, tokens, len(y), y.dtype)


def added(x: Tensor, gate: Tensor, owned: bool, *branches: Projection) -> Tensor:
    """x + gate * (the sum of each branch's value); x (B, M, D), gate (B, D).

    An `owned` x is one that nobody else reads: it is changed in place where a kernel does that.
    """
    if not adds_in_place(x, gate, owned, *branches):
        return ops.gated_add(x, gate, *(branch.value() for branch in branches))
    for layer, tokens, *_ in branches:
        if isinstance(tokens, Tensor):
            ops.add_linear_(x, gate, tokens, layer.packed, layer.mode)
        else:
            ops.add_product_(x, gate, tokens, layer.packed)
    return x


def adds_in_place(x: Tensor, gate: Tensor, owned: bool, *branches: Projection) -> bool:
    """Whether `added` changes x, so that each branch may as well be added by itself."""
    fit = all(_bare(branch.layer) and ops.adds_at_once(x, gate, branch.layer.packed) for branch in branches)
    return owned and fit and not torch.compiler.is_compiling()


def _bare(layer: Any) -> bool:
    """Whether a layer is no more than its packed weights: no GELU, LoRA's scales or hooks, which `forward` sees to."""
    if not isinstance(layer, SVDQuantLinear) or layer.gelu or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return layer.branch_scale is None and layer.bias_delta is None


class _Place(NamedTuple):
    model: weakref.ref[nn.Module]
    forward: Any
    lists: tuple[str, ...]  # of all placed blocks, in the order in which the model runs them
    name: str
    at: int


# Blocks, and where in which model they are; and the `forward` of diffusers that reads nothing of what it gave them.
_places: WeakKeyDictionary[nn.Module, _Place] = WeakKeyDictionary()


def place_blocks(model: nn.Module, forward: Any, *names: str) -> None:
    """Take note of the blocks in these lists of a model, in the order of a step, for owns_stream and step_blocks.

    `forward` is that of diffusers' class.
    """
    for name in names:
        for index, block in enumerate(getattr(model, name)):
            _places[block] = _Place(weakref.ref(model), forward, names, name, index)


def owns_stream(block: nn.Module) -> bool:
    """Whether a block may change what it is given: a plain step of its model as diffusers wrote it.

    Whoever calls blocks otherwise may look at their inputs afterwards, as caches of the first block do.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or hooked(block):  # compiled, nothing is in place
        return False
    if (place := _places.get(block)) is None:
        return False
    model, forward = place.model(), place.forward
    if model is None or type(model).forward is not forward:
        return False
    own = model.__dict__.get("forward")  # a Recorder's (engine.graphs), or somebody else's
    if own is not None and getattr(getattr(own, "_forward", None), "__func__", None) is not forward:
        return False
    blocks = getattr(model, place.name)
    return place.at < len(blocks) and blocks[place.at] is block


def step_blocks(block: nn.Module) -> list[nn.Module]:
    """All blocks of the model, in order, if this one is the first of a plain step; else none."""
    place = _places.get(block)
    if place is None or place.at or not owns_stream(block):
        return []
    model: Any = place.model()
    blocks = [other for name in place.lists for other in getattr(model, name)]
    return blocks if blocks[0] is block else []


def hooked(module: nn.Module) -> bool:
    """Whether calling a module may be more than its `forward`, as of its class."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or hasattr(module, "_diffusers_hook") or "forward" in vars(module)
