"""What a loaded 4-bit transformer can be told to do otherwise: how it takes its attention, what it keeps in memory."""

from __future__ import annotations

from typing import Any

import torch

from engine import graphs, ops
from engine.errors import ArgumentError
from engine.linear import SVDQuantLinear
from engine.request import ATTENTIONS

__all__ = ["attention_of", "check_attention", "set_attention", "set_wide_weights"]


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
    check_attention(attention)
    blocks = _fused(transformer)
    if attention == "8bit" and not blocks:
        raise ArgumentError("attention: expected 16bit, got '8bit': only 4-bit FLUX with fused projections has it")
    graphs.forget(transformer)
    for block in blocks:
        block.attn.attention = attention


def attention_of(transformer: Any, tokens: int, device: torch.device) -> str | None:
    """What attention of so many tokens is held in, "16bit" or "8bit"; None for a model that has no choice."""
    blocks = _fused(transformer)
    if not blocks:
        return None
    attn = blocks[0].attn
    dtype, head = transformer.dtype, transformer.config.attention_head_dim
    eight = ops.in_8bit(getattr(attn, "attention", "auto"), tokens, device, dtype, head)
    return "8bit" if eight else "16bit"


def _fused(transformer: Any) -> list[Any]:
    from engine.models.flux_blocks import FusedDoubleBlock, FusedSingleBlock, is_plain

    kinds = FusedDoubleBlock | FusedSingleBlock
    return [module for module in transformer.modules() if isinstance(module, kinds) and is_plain(module.attn)]


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
