"""SANA's block with fewer copies and passes: diffusers' own class, of which `forward` alone is another.

A block that is asked for more than a plain step (another attention processor, norms of queries) runs as diffusers
wrote it. `fuse_blocks(model)` and `unfuse_blocks(model)` switch; the picture is the same.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.transformers.sana_transformer import (
    SanaAttnProcessor2_0,
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from torch import Tensor

from engine import ops
from engine.models.normed import added, normed, owns_stream, place_blocks, ready
from engine.models.sana import ChannelsLastGLU, LinearAttention

__all__ = ["FusedSanaBlock", "fuse_blocks", "unfuse_blocks"]


class FusedSanaBlock(SanaTransformerBlock):
    """A block whose projections take the norms before them along, and whose feed-forward keeps tokens in rows."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        height: Any = None,
        width: Any = None,
    ) -> Tensor:
        """picture (B, M, D), text (B, L, D), timestep (B, 6 D) -> the picture after the block."""
        if attention_mask is not None or encoder_hidden_states is None or not _plain(self):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep, height, width
            )
        modulation = self.scale_shift_table[None] + timestep.reshape(len(hidden_states), 6, -1)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(1)
        attn: Any = self.attn1
        (qkv,) = normed(hidden_states, scale, shift, self.norm1, attn.to_qkv)
        attended = ops.linear_attention(qkv.value(), attn.heads)
        x = added(hidden_states, gate, owns_stream(self), ready(attn.to_out[0], attended))
        x = _cross(self.attn2, x, encoder_hidden_states, encoder_attention_mask) + x
        ff: Any = self.ff
        (wide,) = normed(x, ff_scale, ff_shift, self.norm2, ff.conv_inverted)
        narrow = ff.between(wide.value().unflatten(1, (height, width))).flatten(1, 2)
        return added(x, ff_gate, True, ready(ff.conv_point, narrow))


_FORWARD = SanaTransformer2DModel.forward


def _plain(block: Any) -> bool:
    attn, cross = block.attn1, getattr(block, "attn2", None)
    return (
        type(attn.processor) is LinearAttention
        and hasattr(attn, "to_qkv")
        and isinstance(block.ff, ChannelsLastGLU)
        and cross is not None
        and type(cross.processor) is SanaAttnProcessor2_0
        and cross.rescale_output_factor == 1.0
        and block.norm2.weight is None
        and not any(part is not None for one in (attn, cross) for part in (one.norm_q, one.norm_k))
    )


def _cross(attn: Any, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the picture (B, M, D) to the text (B, L, D); mask (B, 1, L) is added to the scores."""
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                         for part in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))  # fmt: skip
    bias = None if mask is None else mask.unsqueeze(1)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attn.to_out[0](attended.transpose(1, 2).flatten(2).to(x.dtype))


def fuse_blocks(model: Any) -> None:
    """Let the blocks of a prepared SANA transformer run with fewer copies and passes, in place."""
    for block in model.transformer_blocks:
        if type(block) is SanaTransformerBlock:
            block.__class__ = FusedSanaBlock
    place_blocks(model, _FORWARD, "transformer_blocks")
    # `compile_repeated_blocks` goes by these names.
    model._repeated_blocks = [*(type(model)._repeated_blocks or ()), FusedSanaBlock.__name__]


def unfuse_blocks(model: Any) -> None:
    """Undo `fuse_blocks`: diffusers' own forward again."""
    for block in model.transformer_blocks:
        if type(block) is FusedSanaBlock:
            block.__class__ = SanaTransformerBlock  # pyright: ignore[reportAttributeAccessIssue]
