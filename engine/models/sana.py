"""SANA: which leaves of diffusers' SanaTransformer2DModel become 4-bit.

As in the published checkpoints: self-attention, the query and output of cross-attention, and the two 1x1
convolutions of the feed-forward, which are linears over channels. Keys and values of cross-attention stay 16-bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine import ops
from engine.models.plan import LinearGroup

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.sana_transformer import GLUMBConv

__all__ = [
    "MODEL_CLASS",
    "ChannelsLastGLU",
    "LinearAttention",
    "PerturbedAttention",
    "fuse",
    "plan",
    "prepare",
    "use_fused_qkv",
]

MODEL_CLASS = "SanaTransformer2DModel"


class ChannelsLastGLU(nn.Module):
    """diffusers' GLUMBConv with its 1x1 convolutions as linears over the channels of each token.

    Names are kept: conv_inverted (2H, D) and conv_point (D, H) are linears here, conv_depth is the 3x3 convolution.
    """

    def __init__(self, source: GLUMBConv) -> None:
        super().__init__()
        self.conv_inverted = _linear(source.conv_inverted)
        self.conv_depth = source.conv_depth
        self.conv_point = _linear(source.conv_point)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """x (B, D, height, width) -> the same shape."""
        wide = self.conv_inverted(hidden_states.movedim(1, -1))
        return self.conv_point(self.between(wide)).movedim(-1, 1)

    def between(self, wide: Tensor) -> Tensor:
        """Outputs of conv_inverted (B, height, width, 2H) -> inputs of conv_point (B, height, width, H).

        A 4-bit conv_point is as wide as whole groups of 64; its extra inputs count for nothing.
        """
        conv: Any = self.conv_depth
        return ops.depthwise_glu(wide, conv.weight, conv.bias, self.conv_point.in_features)


def prepare(model: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """Turn the 1x1 convolutions into linears, in place; the function is unchanged."""
    blocks: Any = model.transformer_blocks
    for block in blocks:
        if not isinstance(block.ff, ChannelsLastGLU):
            block.ff = ChannelsLastGLU(block.ff)
    return model


def plan(model: SanaTransformer2DModel) -> list[LinearGroup]:
    """List the groups of linears to replace, in the order the model runs them; `model` must be prepared."""
    groups: list[LinearGroup] = []
    for index in range(len(model.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        groups += [
            LinearGroup(tuple(f"{block}.attn1.to_{part}" for part in "qkv"), fused=f"{block}.attn1.to_qkv"),
            LinearGroup((f"{block}.attn1.to_out.0",)),
            LinearGroup((f"{block}.attn2.to_q",)),
            LinearGroup((f"{block}.attn2.to_out.0",)),
            LinearGroup((f"{block}.ff.conv_inverted",)),
            LinearGroup((f"{block}.ff.conv_point",)),
        ]
    return groups


def fuse(model: SanaTransformer2DModel) -> None:
    """Everything that makes fewer and larger calls of a model whose linears were replaced, in place."""
    from engine.models.sana_blocks import fuse_blocks

    use_fused_qkv(model)
    fuse_blocks(model)


def use_fused_qkv(model: SanaTransformer2DModel) -> None:
    """Let the self-attention of every block that has a `to_qkv` call it: its input is then quantized once."""
    blocks: Any = model.transformer_blocks
    for block in blocks:
        if hasattr(block.attn1, "to_qkv"):
            block.attn1.set_processor(LinearAttention())


class LinearAttention:
    """ops.linear_attention for blocks with or without a fused `to_qkv`."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, M, D) -> (B, M, D)."""
        if hasattr(attn, "to_qkv") and attn.norm_q is None and attn.norm_k is None:
            return _out(attn, ops.linear_attention(attn.to_qkv(hidden_states), attn.heads))
        query, key, value = _qkv(attn, hidden_states)
        return _out(attn, _linear_attention(query, key, value, attn.heads))


class PerturbedAttention:
    """LinearAttention whose last part of the batch attends to nothing but itself (arXiv 2403.17377).

    The batch holds `parts` equal parts: [empty prompt, prompt, perturbed] with guidance, else [prompt, perturbed].
    """

    def __init__(self, parts: int) -> None:
        self.parts = parts

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """x (parts * B, M, D) -> the same shape."""
        query, key, value = _qkv(attn, hidden_states)
        whole = len(value) - len(value) // self.parts
        attended = _linear_attention(query[:whole], key[:whole], value[:whole], attn.heads)
        return _out(attn, torch.cat([attended, value[whole:]]))


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if hasattr(attn, "to_qkv"):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Query, key and value (B, M, D) -> (B, M, D), in their type."""
    return ops.linear_attention(torch.cat([query, key, value], dim=-1), heads)


def _out(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _linear(conv: nn.Conv2d) -> nn.Linear:
    weight = conv.weight
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear
