"""SANA in nunchaku's layout: padded heads, interleaved key and value rows, interleaved GLU channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.linears import Part, SvdqPiece
from engine.checkpoint.packing import round_up
from engine.checkpoint.pieces import FLOATS, Copy, Piece, Stored, Tensors, take

__all__ = ["pieces"]

# The kernels give each key head and its value head 32 + 32 neighbouring rows.
_HEAD = 32


def pieces(config: Mapping[str, Any], precision: str, rank: int, pag_layers: Sequence[int] = ()) -> list[Piece]:
    """All layers of a SanaTransformer2DModel with this diffusers `config`; `pag_layers` have `attn.pag_to_v`."""
    layers: list[Piece] = []
    for index in range(config["num_layers"]):
        layers += _block(f"transformer_blocks.{index}", config, precision, rank, index in pag_layers)
    return layers + _dense(config)


def _block(block: str, config: Mapping[str, Any], precision: str, rank: int, pag: bool) -> list[Piece]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    cross = config["num_cross_attention_heads"] * config["cross_attention_head_dim"]
    padded = round_up(width)
    hidden = int(config["mlp_ratio"] * width)
    glu = round_up(hidden, 64)
    biased = "yes" if config.get("attention_bias") else "no"

    def linear(prefix: str, parts: tuple[Part, ...], n: int, k: int, used_k: int = 0) -> SvdqPiece:
        return SvdqPiece(f"{block}.{prefix}", parts, n, k, precision, rank, used_k=used_k)

    keys = padded + _interleaved_heads(width)
    qkv = (
        Part(f"{block}.attn1.to_q", slice(0, width), biased),
        Part(f"{block}.attn1.to_k", keys, biased),
        Part(f"{block}.attn1.to_v", keys + _HEAD, biased),
    )
    pag_v = Part(f"{block}.attn1.pag_to_v", slice(0, width), "no")
    layers: list[Piece] = [
        linear("attn.qkv_proj", qkv, 3 * padded, width),
        linear("attn.out_proj", (Part(f"{block}.attn1.to_out.0", slice(0, width)),), width, padded, width),
        *([linear("attn.pag_to_v", (pag_v,), padded, width)] if pag else []),
        linear("cross_attn.q_linear", (Part(f"{block}.attn2.to_q", slice(0, cross)),), cross, width),
        linear("cross_attn.out_proj", (Part(f"{block}.attn2.to_out.0", slice(0, width)),), width, cross),
        linear("ff.inverted_conv", (Part(f"{block}.ff.conv_inverted", _glu_rows(hidden)),), 2 * glu, width),
        linear("ff.point_conv", (Part(f"{block}.ff.conv_point", slice(0, width), "no"),), width, glu, hidden),
        KeyValue(block, cross, config["cross_attention_dim"]),
        DepthConv(block, hidden, glu),
        Copy(f"{block}.scale_shift_table", f"{block}.scale_shift_table", (6, width)),
    ]
    return layers


def _interleaved_heads(width: int) -> Tensor:
    """Row of each key channel among [32 of k | 32 of v] a head."""
    channel = torch.arange(width)
    return 2 * _HEAD * (channel // _HEAD) + channel % _HEAD


def _glu_rows(hidden: int) -> Tensor:
    """Stored row of each diffusers channel: values on even rows, gates on odd ones."""
    channel = torch.arange(hidden)
    return torch.cat([2 * channel, 2 * channel + 1])


def _dense(config: Mapping[str, Any]) -> list[Piece]:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config.get("patch_size", 1)
    channels = config["in_channels"]
    out = patch * patch * (config.get("out_channels") or channels)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, channels, patch, patch),
        "patch_embed.proj.bias": (width,),
        "caption_norm.weight": (width,),
        "scale_shift_table": (2, width),
    }
    linears = {
        "time_embed.linear": (6 * width, width),
        "time_embed.emb.timestep_embedder.linear_1": (width, 256),
        "time_embed.emb.timestep_embedder.linear_2": (width, width),
        "caption_projection.linear_1": (width, config["caption_channels"]),
        "caption_projection.linear_2": (width, width),
        "proj_out": (out, width),
    }
    for name, (n, k) in linears.items():
        shapes |= {f"{name}.weight": (n, k), f"{name}.bias": (n,)}
    return [Copy(name, name, shape) for name, shape in shapes.items()]


@dataclass(frozen=True)
class KeyValue:
    """Cross-attention keys and values: one 16-bit linear whose rows are [K | V]."""

    block: str
    n: int
    k: int

    def stored(self) -> dict[str, Stored]:
        start = f"{self.block}.cross_attn.kv_linear"
        return {f"{start}.weight": Stored((2 * self.n, self.k), FLOATS), f"{start}.bias": Stored((2 * self.n,), FLOATS)}

    def canonical(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part in ("to_k", "to_v"):
            shapes |= {
                f"{self.block}.attn2.{part}.weight": (self.n, self.k),
                f"{self.block}.attn2.{part}.bias": (self.n,),
            }
        return shapes

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        tensors = {}
        for kind in ("weight", "bias"):
            halves = raw[f"{self.block}.cross_attn.kv_linear.{kind}"].chunk(2)
            for part, half in zip(("to_k", "to_v"), halves, strict=True):
                tensors[f"{self.block}.attn2.{part}.{kind}"] = half
        return tensors

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        shapes = self.canonical()
        return {
            f"{self.block}.cross_attn.kv_linear.{kind}": torch.cat(
                [
                    take(tensors, name, shapes[name])
                    for name in (f"{self.block}.attn2.to_k.{kind}", f"{self.block}.attn2.to_v.{kind}")
                ]
            )
            for kind in ("weight", "bias")
        }


@dataclass(frozen=True)
class DepthConv:
    """The depthwise 3x3 convolution: channels last, GLU channels interleaved and padded with zeros."""

    block: str
    hidden: int
    padded: int

    def stored(self) -> dict[str, Stored]:
        channels = 2 * self.padded
        start = f"{self.block}.ff.depth_conv"
        return {f"{start}.weight": Stored((channels, 3, 3, 1), FLOATS), f"{start}.bias": Stored((channels,), FLOATS)}

    def canonical(self) -> dict[str, tuple[int, ...]]:
        channels = 2 * self.hidden
        start = f"{self.block}.ff.conv_depth"
        return {f"{start}.weight": (channels, 1, 3, 3), f"{start}.bias": (channels,)}

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        start = f"{self.block}.ff.depth_conv"
        rows = _glu_rows(self.hidden).to(raw[f"{start}.bias"].device)
        weight = raw[f"{start}.weight"][rows].permute(0, 3, 1, 2).contiguous()
        return {
            f"{self.block}.ff.conv_depth.weight": weight,
            f"{self.block}.ff.conv_depth.bias": raw[f"{start}.bias"][rows],
        }

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        stored = {}
        shapes = self.canonical()
        rows = _glu_rows(self.hidden)
        for kind in ("weight", "bias"):
            name = f"{self.block}.ff.conv_depth.{kind}"
            value = take(tensors, name, shapes[name])
            value = value.permute(0, 2, 3, 1) if kind == "weight" else value
            whole = value.new_zeros((2 * self.padded, *value.shape[1:]))
            whole[rows] = value
            stored[f"{self.block}.ff.depth_conv.{kind}"] = whole
        return stored
