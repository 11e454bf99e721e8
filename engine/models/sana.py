"""SANA: which leaves of diffusers' SanaTransformer2DModel become 4-bit.

As in the published checkpoints: self-attention, the query and output of cross-attention, and the two 1x1
convolutions of the feed-forward, which are linears over channels. Keys and values of cross-attention stay 16-bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.models.plan import LinearGroup

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel
    from diffusers.models.transformers.sana_transformer import GLUMBConv

__all__ = ["MODEL_CLASS", "ChannelsLastGLU", "plan", "prepare", "use_fused_qkv"]

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
        x = nn.functional.silu(self.conv_inverted(hidden_states.movedim(1, -1)))
        x = self.conv_depth(x.movedim(-1, 1))
        value, gate = x.movedim(1, -1).chunk(2, dim=-1)
        x = value * nn.functional.silu(gate)
        # A 4-bit conv_point is as wide as whole groups of 64; its extra inputs count for nothing.
        x = nn.functional.pad(x, (0, self.conv_point.in_features - x.shape[-1]))
        return self.conv_point(x).movedim(-1, 1)


def prepare(model: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """Turn the 1x1 convolutions into linears, in place; the function is unchanged."""
    for block in model.transformer_blocks:
        if not isinstance(block.ff, ChannelsLastGLU):
            block.ff = ChannelsLastGLU(block.ff)
    return model


def plan(model: SanaTransformer2DModel) -> list[LinearGroup]:
    """List the groups of linears to replace, in the order the model runs them; `model` must be prepared."""
    groups: list[LinearGroup] = []
    for index in range(len(model.transformer_blocks)):
        block = f"transformer_blocks.{index}"
        groups += [
            LinearGroup(tuple(f"{block}.attn1.to_{part}" for part in "qkv")),
            LinearGroup((f"{block}.attn1.to_out.0",)),
            LinearGroup((f"{block}.attn2.to_q",)),
            LinearGroup((f"{block}.attn2.to_out.0",)),
            LinearGroup((f"{block}.ff.conv_inverted",)),
            LinearGroup((f"{block}.ff.conv_point",)),
        ]
    return groups


def use_fused_qkv(model: SanaTransformer2DModel) -> None:
    """SANA's attention processors call q, k and v apart, so nothing is fused."""


def _linear(conv: nn.Conv2d) -> nn.Linear:
    weight = conv.weight
    linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None, device="meta", dtype=weight.dtype)
    with torch.no_grad():
        linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
        if conv.bias is not None:
            linear.bias = nn.Parameter(conv.bias.detach(), requires_grad=False)
    return linear
