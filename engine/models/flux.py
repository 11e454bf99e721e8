"""FLUX.1: which leaves of diffusers' FluxTransformer2DModel become 4-bit.

The block structure and the grouping follow the published SVDQuant checkpoints: q, k and v of one stream share a
smooth factor and a down-projection, a single block's output projection is two linears (attention columns, MLP
columns), MLP down-projections read GELU outputs, and the adaLN modulations are weight-only.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from engine.linear import SVDQuantLinear
from engine.models.flux_blocks import fuse_blocks
from engine.models.plan import LinearGroup

__all__ = ["MODEL_CLASS", "SplitLinear", "fuse", "plan", "prepare", "use_fused_gelu", "use_fused_qkv"]

MODEL_CLASS = "FluxTransformer2DModel"


class SplitLinear(nn.Module):
    """A linear over concatenated inputs, kept as one linear per part: y = attn(x[..., :D]) + mlp(x[..., D:]).

    The two parts see inputs of different kinds (attention output, GELU output) and are quantized apart.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, split: int) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D + 4D) -> (..., D)."""
        return self.attn(x[..., : self.split]) + self.mlp(x[..., self.split :])


def prepare(model: Any) -> Any:
    """Split each single block's `proj_out` into its attention and MLP parts, in place; the function is unchanged."""
    for block in model.single_transformer_blocks:
        if not isinstance(block.proj_out, SplitLinear):
            block.proj_out = _split(block.proj_out)
    return model


def plan(model: FluxTransformer2DModel) -> list[LinearGroup]:
    """List the groups of linears to replace, in the order the model runs them; `model` must be prepared."""
    groups: list[LinearGroup] = []
    for index in range(len(model.transformer_blocks)):
        groups += _double_block(f"transformer_blocks.{index}")
    for index in range(len(model.single_transformer_blocks)):
        groups += _single_block(f"single_transformer_blocks.{index}")
    return groups


def fuse(model: Any) -> None:
    """Everything below that makes fewer and larger calls of a model whose linears were replaced, in place."""
    use_fused_qkv(model)
    use_fused_gelu(model)
    fuse_blocks(model)


def use_fused_gelu(model: Any) -> None:
    """Let the linears before a GELU apply it, where their kernels do that at no cost."""
    for block in model.transformer_blocks:
        for branch in (block.ff, block.ff_context):
            activation = branch.net[0]
            if _applies_gelu(activation.proj):
                activation.gelu = _as_it_is
    for block in model.single_transformer_blocks:
        if _applies_gelu(block.proj_mlp):
            block.act_mlp = nn.Identity()


def _applies_gelu(linear: nn.Module) -> bool:
    if not isinstance(linear, SVDQuantLinear) or linear.backend not in ("sm90a", "sm80"):
        return False
    linear.gelu = True
    return True


def _as_it_is(x: Tensor) -> Tensor:
    return x


def use_fused_qkv(model: Any) -> None:
    """Make diffusers' attention call `to_qkv` (and `to_added_qkv`) in every block that has it.

    A stream whose projections were kept in 16 bits is concatenated too, since the switch is one for both streams.
    """
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        attn = block.attn
        if not (hasattr(attn, "to_qkv") or hasattr(attn, "to_added_qkv")):
            continue
        _concatenate(attn, ("to_q", "to_k", "to_v"), "to_qkv")
        if attn.added_kv_proj_dim is not None:
            _concatenate(attn, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")
        attn.fused_projections = True


def _concatenate(attn: nn.Module, names: tuple[str, ...], fused: str) -> None:
    if hasattr(attn, fused):
        return
    parts: list[nn.Linear] = [getattr(attn, name) for name in names]
    first = parts[0]
    rows = sum(part.out_features for part in parts)
    whole = nn.Linear(first.in_features, rows, bias=first.bias is not None, device="meta")
    whole.weight = nn.Parameter(torch.cat([part.weight for part in parts]), requires_grad=False)
    if first.bias is not None:
        whole.bias = nn.Parameter(torch.cat([part.bias for part in parts]), requires_grad=False)
    setattr(attn, fused, whole)
    for name in names:
        delattr(attn, name)


def _double_block(block: str) -> list[LinearGroup]:
    image = tuple(f"{block}.attn.to_{part}" for part in "qkv")
    text = tuple(f"{block}.attn.add_{part}_proj" for part in "qkv")
    return [
        LinearGroup((f"{block}.norm1.linear",), kind="awq"),
        LinearGroup((f"{block}.norm1_context.linear",), kind="awq"),
        LinearGroup(image, fused=f"{block}.attn.to_qkv"),
        LinearGroup(text, fused=f"{block}.attn.to_added_qkv"),
        LinearGroup((f"{block}.attn.to_out.0",)),
        LinearGroup((f"{block}.attn.to_add_out",)),
        LinearGroup((f"{block}.ff.net.0.proj",)),
        LinearGroup((f"{block}.ff.net.2",), unsigned=True),
        LinearGroup((f"{block}.ff_context.net.0.proj",)),
        LinearGroup((f"{block}.ff_context.net.2",), unsigned=True),
    ]


def _single_block(block: str) -> list[LinearGroup]:
    return [
        LinearGroup((f"{block}.norm.linear",), kind="awq"),
        LinearGroup(tuple(f"{block}.attn.to_{part}" for part in "qkv"), fused=f"{block}.attn.to_qkv"),
        LinearGroup((f"{block}.proj_mlp",)),
        LinearGroup((f"{block}.proj_out.attn",)),
        LinearGroup((f"{block}.proj_out.mlp",), unsigned=True),
    ]


def _split(linear: nn.Linear) -> SplitLinear:
    width = linear.out_features
    factory = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    attn = nn.Linear(width, width, bias=False, **factory)
    mlp = nn.Linear(linear.in_features - width, width, bias=linear.bias is not None, **factory)
    with torch.no_grad():
        attn.weight = nn.Parameter(linear.weight[:, :width].detach().clone(), requires_grad=False)
        mlp.weight = nn.Parameter(linear.weight[:, width:].detach().clone(), requires_grad=False)
        if linear.bias is not None:
            mlp.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
    return SplitLinear(attn, mlp, width)
