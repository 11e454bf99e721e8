"""What a loaded 4-bit transformer can be told to do otherwise: how it takes its attention, what it keeps in memory."""

from __future__ import annotations

from typing import Any

from engine import graphs
from engine.errors import ArgumentError
from engine.linear import SVDQuantLinear
from engine.request import ATTENTIONS

__all__ = ["check_attention", "set_attention", "set_wide_weights"]


def check_attention(attention: str) -> None:
    """Raise ArgumentError for an unknown name."""
    if attention not in ATTENTIONS:
        raise ArgumentError(f"attention: expected {', '.join(ATTENTIONS[:-1])} or {ATTENTIONS[-1]}, got {attention!r}")


def set_attention(transformer: Any, attention: str) -> None:
    """Let a 4-bit FLUX transformer hold probabilities and values of its attention in 16 bits, or in 8.

    ops.attention_8bit says what that is, ops.in_8bit what "auto", the default, means; it counts from the next step on.

    Raises ArgumentError for an unknown name, and for 8 bits where the model has none: SANA's attention is linear, and
    16-bit models run as diffusers wrote them.
    """
    from engine.models.flux_blocks import FusedDoubleBlock, FusedSingleBlock

    check_attention(attention)
    blocks: list[Any] = [
        module for module in transformer.modules() if isinstance(module, FusedDoubleBlock | FusedSingleBlock)
    ]
    if attention == "8bit" and not blocks:
        raise ArgumentError("attention: expected 16bit, got '8bit': 4-bit FLUX models alone have 8-bit attention")
    graphs.forget(transformer)
    for block in blocks:
        block.attn.attention = attention


def set_wide_weights(transformer: Any, wide: bool) -> None:
    """Keep 8-bit copies of a transformer's 4-bit weights on Hopper, or no more; they count from the next step on.

    A product for many tokens multiplies 8-bit weights there, which are made anew each time otherwise. The copies take a
    byte a weight: 8.3 GiB for FLUX.1. Raises ArgumentError where they serve nothing.
    """
    layers = [module for module in transformer.modules() if isinstance(module, SVDQuantLinear)]
    hopper = [layer for layer in layers if layer.backend == "sm90a"]
    if wide and (not hopper or next(hopper[0].buffers()).device.type == "cpu"):
        raise ArgumentError("wide_weights: expected False, got True: only 4-bit models that stay on an H100 or H200 do")
    graphs.forget(transformer)
    for layer in hopper:
        layer.keep_wide(wide)
