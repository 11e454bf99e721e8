"""FLUX.1's blocks with fewer copies and passes: diffusers' own classes, of which `forward` alone is another.

A block that is asked for more than a plain step (another attention processor, attention arguments) runs as diffusers
wrote it. `fuse_blocks(model)` and `unfuse_blocks(model)` switch; the picture is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from engine import ops
from engine.lanes import Lane
from engine.models.modulation import modulations
from engine.models.normed import (
    Projection,
    added,
    adds_in_place,
    heads,
    normed,
    owns_stream,
    place_blocks,
    ready,
)

__all__ = ["FusedDoubleBlock", "FusedSingleBlock", "fuse_blocks", "is_plain", "unfuse_blocks"]

Rotary = tuple[Tensor, Tensor]


class FusedSingleBlock(FluxSingleTransformerBlock):
    """A single block whose projections read the stream, attention's and the MLP's outputs where they are."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """picture (B, M, D), text (B, L, D), temb (B, D) -> text, picture after the block."""
        if joint_attention_kwargs or image_rotary_emb is None or not is_plain(self.attn):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        text, x = encoder_hidden_states.shape[1], _joined(encoder_hidden_states, hidden_states)
        (modulation,) = modulations(self, temb, _norms)
        shift, scale, gate = modulation.chunk(3, dim=1)
        qkv, mlp = normed(x, scale, shift, self.norm.norm, self.attn.to_qkv, self.proj_mlp)
        out: Any = self.proj_out
        owned, late, lane = owns_stream(self), [], Lane(x)
        with lane:  # nothing of the MLP needs attention
            inner = ready(out.mlp, self.act_mlp(mlp.value()))
            if adds_in_place(x, gate, owned, inner):
                added(x, gate, owned, inner)
            else:
                late = [inner]
        outer = ready(out.attn, _attend(self.attn, [qkv], image_rotary_emb))
        lane.join()
        x = added(x, gate, owned, outer, *late)
        if x.dtype == torch.float16:
            x = x.clip(-65504, 65504)
        return x[:, :text], x[:, text:]


class FusedDoubleBlock(FluxTransformerBlock):
    """A double block whose projections take the norms before them along."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: Rotary | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """picture (B, M, D), text (B, L, D), temb (B, D) -> text, picture after the block."""
        if joint_attention_kwargs or image_rotary_emb is None or not is_plain(self.attn):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        attn, length = self.attn, encoder_hidden_states.shape[1]
        picture, text = (modulation.chunk(6, dim=1) for modulation in modulations(self, temb, _norms))
        lane = Lane(hidden_states)
        with lane:
            (words,) = normed(encoder_hidden_states, text[1], text[0], self.norm1_context.norm, attn.to_added_qkv)
        (qkv,) = normed(hidden_states, picture[1], picture[0], self.norm1.norm, attn.to_qkv)
        lane.join()
        attended = _attend(attn, [words, qkv], image_rotary_emb)
        seen, read, owned = attended[:, length:], attended[:, :length], owns_stream(self)
        with lane:
            x = added(encoder_hidden_states, text[2], owned, ready(attn.to_add_out, read.contiguous()))
            x = _feed(self.ff_context, self.norm2_context, x, text)
            if x.dtype == torch.float16:
                x = x.clip(-65504, 65504)
        hidden_states = added(hidden_states, picture[2], owned, ready(attn.to_out[0], seen.contiguous()))
        hidden_states = _feed(self.ff, self.norm2, hidden_states, picture)
        lane.join()
        return x, hidden_states


def _joined(text: Tensor, picture: Tensor) -> Tensor:
    """torch.cat along the tokens; without a copy where both are views of one tensor, as the block before left them."""
    if not torch.compiler.is_compiling() and text.untyped_storage().data_ptr() == picture.untyped_storage().data_ptr():
        batch, words, width = text.shape
        shape = (batch, words + picture.shape[1], width)
        strides = (shape[1] * width, width, 1)
        beside = picture.storage_offset() == text.storage_offset() + words * width
        if beside and text.stride() == strides and picture.stride() == strides:
            return text.as_strided(shape, strides)
    return torch.cat([text, picture], dim=1)


def is_plain(attn: Any) -> bool:
    """Whether a block with this attention runs fused. Without fused projections nothing is gained."""
    return type(attn.processor) is FluxAttnProcessor and attn.fused_projections


def _norms(block: Any) -> tuple[Any, ...]:
    """The norms whose modulation a block asks for in a plain step."""
    if not isinstance(block, (FusedDoubleBlock, FusedSingleBlock)) or not is_plain(block.attn):
        return ()
    return (block.norm1, block.norm1_context) if isinstance(block, FusedDoubleBlock) else (block.norm,)


def _feed(ff: Any, norm: nn.LayerNorm, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
    """A stream (B, M, D) of the block's own with its feed-forward network added.

    modulation is shift, scale, gate (B, D) twice.
    """
    activation, _, out = ff.net
    (y,) = normed(x, modulation[4], modulation[3], norm, activation.proj)
    return added(x, modulation[5], True, ready(out, activation.gelu(y.value())))


def _attend(attn: Any, projections: list[Projection], rotary: Rotary) -> Tensor:
    """Attention of a joint sequence: text (B, L, 3 D), if any, and picture (B, M, 3 D) -> (B, L + M, D)."""
    norms = [attn.norm_q, attn.norm_k] + ([attn.norm_added_q, attn.norm_added_k] if len(projections) == 2 else [])
    query, key, value = heads(projections, norms, rotary)
    if ops.in_8bit(getattr(attn, "attention", "auto"), query.shape[1], query.device, query.dtype, query.shape[-1]):
        return ops.attention_8bit(query, key, value)
    out: Any = dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend)
    return out.flatten(2, 3).to(query.dtype)


_FORWARD = FluxTransformer2DModel.forward
_FUSED = {FluxSingleTransformerBlock: FusedSingleBlock, FluxTransformerBlock: FusedDoubleBlock}


def fuse_blocks(model: Any) -> None:
    """Let the blocks of a prepared FLUX transformer run with fewer copies and passes, in place."""
    _become(model, _FUSED)
    place_blocks(model, _FORWARD, "transformer_blocks", "single_transformer_blocks")
    # `compile_repeated_blocks` goes by these names.
    model._repeated_blocks = [*type(model)._repeated_blocks, *(new.__name__ for new in _FUSED.values())]


def unfuse_blocks(model: Any) -> None:
    """Undo `fuse_blocks`: diffusers' own forward again."""
    _become(model, {new: old for old, new in _FUSED.items()})


def _become(model: Any, classes: dict[type, type]) -> None:
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.__class__ = classes.get(type(block), type(block))
