"""The tiling "mma64": NVFP4 weights in the order in which consumer Blackwell's mma.sync reads them.

A tile is 16 outputs by 64 inputs, which are two products of 8 outputs. Lane l of a warp (g = l / 4, q = l % 4) reads
four words of codes: word 2 h + r holds output 8 h + g and inputs 32 r + 8 q + 0..7, the first in the lowest bits.

    lane     0 (g 0, q 0)             1 (g 0, q 1)             ...   4 (g 1, q 0)
    word 0   output 0, inputs  0..7   output 0, inputs  8..15        output 1, inputs  0..7
    word 1   output 0, inputs 32..39  output 0, inputs 40..47        output 1, inputs 32..39
    word 2   output 8, inputs  0..7   output 8, inputs  8..15        output 9, inputs  0..7
    word 3   output 8, inputs 32..39  output 8, inputs 40..47        output 9, inputs 32..39

A word of scales holds an output's four, for inputs 0..15, 16..31, 32..47 and 48..63; outputs g and 8 + g lie side by
side. The low-rank factors are tiled alike, for the product of 16-bit numbers: word 2 h + r of lane l holds row 8 h + g
and columns 8 r + 2 q + 0..1 of 16 rows by 16 columns. Rows are outputs in `up`, ranks in `down`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.canonical import CanonicalLinear

if TYPE_CHECKING:
    from engine.ops.spec import Shapes, Spec

__all__ = ["PANEL", "fill", "read", "shapes", "tile_codes", "tile_factor", "tile_scales", "untile_codes",
           "untile_factor", "untile_scales"]  # fmt: skip

PANEL = 16  # outputs of a tile


def shapes(spec: Spec) -> Shapes:
    """Sections in the order of WeightFp4 in csrc/cuda/kernels.h; what follows `factor` is for the way back."""
    panels, steps, ranks, dtype = -(-spec.n // PANEL), spec.k // 64, spec.rank // 16, spec.dtype_of
    low_rank, factors = dtype.get("lora_up", torch.bfloat16), {"wtscale": (1,), "wcscales": (spec.n,)}
    return {
        "codes": (torch.uint8, (panels, steps, 32, 16)),
        "scales": (torch.float8_e4m3fn, (panels, steps, 8, 2, 4)),
        "up": (low_rank, (panels, ranks, 32, 8)),
        "down": (low_rank, (spec.k // 16, ranks, 32, 8)),
        "inv_smooth": (torch.float32, (spec.k,)),
        "bias": (torch.float32, (panels * PANEL,)),
        "factor": (torch.float32, (panels * PANEL,)),
        "smooth": (torch.float32, (spec.k,)),
        **{name: (dtype[name], shape) for name, shape in factors.items() if name in dtype},
    }


def fill(linear: CanonicalLinear, parts: dict[str, Tensor]) -> None:
    """Tile every tensor of `linear` into its section, which holds zeros."""
    parts["codes"].copy_(tile_codes(linear.codes))
    parts["scales"].copy_(tile_scales(linear.wscales))
    if linear.lora_down is not None and linear.lora_up is not None:
        parts["up"].copy_(tile_factor(linear.lora_up))
        parts["down"].copy_(tile_factor(linear.lora_down).transpose(0, 1))
    smooth = torch.ones_like(parts["smooth"]) if linear.smooth is None else linear.smooth.float()
    parts["smooth"].copy_(smooth)
    parts["inv_smooth"].copy_(1.0 / smooth)
    if linear.bias is not None:
        parts["bias"][: linear.n].copy_(linear.bias)
    parts["factor"].fill_(1.0)
    for name in ("wtscale", "wcscales"):
        value = getattr(linear, name)
        if value is not None:
            parts[name].copy_(value)
            parts["factor"][: linear.n].mul_(value.float())


def read(spec: Spec, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the canonical form; those that the layer lacks may be among them."""
    return {name: parts[name] for name in ("wtscale", "wcscales") if name in parts} | {
        "codes": untile_codes(parts["codes"], spec.n),
        "wscales": untile_scales(parts["scales"], spec.n),
        "smooth": parts["smooth"],
        "lora_up": untile_factor(parts["up"], spec.n),
        "lora_down": untile_factor(parts["down"].transpose(0, 1), spec.rank),
        "bias": parts["bias"][: spec.n],
    }


def tile_codes(codes: Tensor) -> Tensor:
    """Canonical bytes (N, K/2) -> (panels, K/64, 32, 16); codes of zero past N."""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[0] % PANEL))
    #   panel, h, g; step, r, q, byte -> panel, step; g, q; h, r, byte
    split = padded.view(-1, 2, 8, codes.shape[1] // 32, 2, 4, 4)
    return split.permute(0, 3, 2, 5, 1, 4, 6).reshape(split.shape[0], split.shape[3], 32, 16)


def untile_codes(tiles: Tensor, n: int) -> Tensor:
    """The inverse of tile_codes."""
    split = tiles.view(*tiles.shape[:2], 8, 4, 2, 2, 4).permute(0, 4, 2, 1, 5, 3, 6)
    return split.reshape(tiles.shape[0] * PANEL, -1)[:n]


def tile_scales(scales: Tensor) -> Tensor:
    """e4m3 (N, K/16) -> (panels, K/64, 8, 2, 4); zeros past N."""
    padded = F.pad(scales.view(torch.uint8), (0, 0, 0, -scales.shape[0] % PANEL))
    split = padded.view(-1, 2, 8, scales.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return split.contiguous().view(scales.dtype)


def untile_scales(tiles: Tensor, n: int) -> Tensor:
    """The inverse of tile_scales."""
    rows = tiles.view(torch.uint8).permute(0, 3, 2, 1, 4).reshape(tiles.shape[0] * PANEL, -1)[:n]
    return rows.contiguous().view(tiles.dtype)


def tile_factor(factor: Tensor) -> Tensor:
    """16-bit (rows, columns) -> (rows/16, columns/16, 32, 8); zeros past the last row."""
    padded = F.pad(factor, (0, 0, 0, -factor.shape[0] % PANEL))
    #   panel, h, g; step, r, q, one of two -> panel, step; g, q; h, r, one of two
    split = padded.view(padded.shape[0] // PANEL, 2, 8, factor.shape[1] // 16, 2, 4, 2)
    return split.permute(0, 3, 2, 5, 1, 4, 6).reshape(split.shape[0], split.shape[3], 32, 8)


def untile_factor(tiles: Tensor, rows: int) -> Tensor:
    """The inverse of tile_factor."""
    split = tiles.reshape(*tiles.shape[:2], 8, 4, 2, 2, 2).permute(0, 4, 2, 1, 5, 3, 6)
    return split.reshape(tiles.shape[0] * PANEL, tiles.shape[1] * 16)[:rows]
