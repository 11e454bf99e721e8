"""In how many bits attention holds its probabilities and values."""

from __future__ import annotations

from typing import Any

from engine import graphs
from engine.errors import ArgumentError

__all__ = ["ATTENTIONS", "set_attention"]

ATTENTIONS = ("16bit", "8bit")


def set_attention(transformer: Any, attention: str) -> None:
    """Let a 4-bit FLUX transformer hold probabilities and values of its attention in 16 bits, or in 8.

    ops.attention_8bit says what that is; it counts from the next step on.

    Raises ArgumentError for an unknown name, and for 8 bits where the model has none: SANA's attention is linear, and
    16-bit models run as diffusers wrote them.
    """
    from engine.models.flux_blocks import FusedDoubleBlock, FusedSingleBlock

    if attention not in ATTENTIONS:
        raise ArgumentError(f"attention: expected {' or '.join(ATTENTIONS)}, got {attention!r}")
    blocks: list[Any] = [
        module for module in transformer.modules() if isinstance(module, FusedDoubleBlock | FusedSingleBlock)
    ]
    if attention == "8bit" and not blocks:
        raise ArgumentError("attention: expected 16bit, got '8bit': 4-bit FLUX models alone have 8-bit attention")
    graphs.forget(transformer)
    for block in blocks:
        block.attn.eight_bit = attention == "8bit"
