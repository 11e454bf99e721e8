"""Shifts, scales and gates of a step: layers of all blocks that read one embedding, multiplied at once.

The first block of a plain step has them computed, and each block takes its own. What is kept belongs to the embedding:
it goes when that does, or with the last part taken, and counts for nothing once the embedding or a layer has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from engine import ops
from engine.linear import AWQLinear
from engine.models.normed import hooked, step_blocks

__all__ = ["modulations"]

Norms = Callable[[nn.Module], Sequence[Any]]


def modulations(block: nn.Module, temb: Tensor, norms_of: Norms) -> list[Tensor]:
    """norm.linear(norm.silu(temb)) of each norm of a block; temb (B, D) -> (B, N) each.

    `norms_of` names the norms of a block that will ask for them in a plain step: of any of the model's.
    """
    norms, plain = norms_of(block), not torch.compiler.is_compiling() and not torch.is_grad_enabled()
    step = _step_of(block, temb, norms_of) if plain else None
    if step is None:
        return [norm.linear(norm.silu(temb)) for norm in norms]
    found = [step.take(norm, temb) for norm in norms]
    if not step.parts:
        del _steps[temb]
    return found


def _step_of(block: nn.Module, temb: Tensor, norms_of: Norms) -> _Step | None:
    """What is known of an embedding as it is now, begun anew by the first block of a plain step."""
    # It never takes what is there: temb may be a buffer that is filled anew for each step.
    if blocks := step_blocks(block):
        _steps[temb] = _Step(temb, [norm for other in blocks if not hooked(other) for norm in norms_of(other)])
    step: _Step | None = _steps.get(temb)
    return step if step is not None and step.version == _version(temb) else None


class _Step:
    """What is known of an embedding: its SiLU, and outputs that no block has taken yet."""

    def __init__(self, temb: Tensor, norms: Iterable[Any]) -> None:
        self.version = _version(temb)
        self._x = F.silu(temb)
        layers = [norm.linear for norm in norms if _bare(norm) and _reads(norm.linear, temb)]
        packed = [layer.packed for layer in layers]
        outputs = zip(packed, ops.awq_linears(self._x, packed), strict=True)
        self.parts: dict[nn.Module, tuple[ops.PackedAwq, Tensor]] = dict(zip(layers, outputs, strict=True))

    def take(self, norm: Any, temb: Tensor) -> Tensor:
        """norm.linear(norm.silu(temb)): what was computed, once, if the layer is as it was then."""
        packed, y = self.parts.pop(norm.linear, (None, None))
        if y is not None and _bare(norm) and packed is norm.linear.packed:
            return y
        return norm.linear(self._x if _plain_silu(norm) else norm.silu(temb))


# By embeddings: a step's is a tensor of its own.
_steps: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _version(temb: Tensor) -> int | None:
    return None if temb.is_inference() else temb._version


def _plain_silu(norm: Any) -> bool:
    return type(norm.silu) is nn.SiLU and not norm.silu.inplace and not hooked(norm.silu)


def _bare(norm: Any) -> bool:
    """Whether a norm's layer is no more than its packed weights: no LoRA, no hooks, which its `forward` sees to."""
    layer = norm.linear
    if type(layer) is not AWQLinear or hooked(layer) or not _plain_silu(norm):
        return False
    return layer.branch is None and layer.bias_delta is None


def _reads(layer: AWQLinear, temb: Tensor) -> bool:
    return layer.packed.blob.device == temb.device and layer.packed.k == temb.shape[-1]
