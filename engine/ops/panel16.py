"""The tiling "panel16": 16 outputs side by side, in the order in which the inner loops of a CPU and of sm80 read them.

csrc/ops.h draws it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.canonical import AwqWeight, CanonicalLinear, join_nibbles, split_nibbles

if TYPE_CHECKING:
    from engine.ops.spec import Shapes, Spec

__all__ = ["fill", "read", "shapes"]

PANEL = 16
_SIGN = 8  # two's complement nibbles turned by this are codes plus 8, which is what the kernels read


def shapes(spec: Spec) -> Shapes:
    """Sections in the order csrc/ops.h names them; `smooth` is kept for the way back."""
    panels, k, rank, dtype = -(-spec.n // PANEL), spec.k, spec.rank, spec.dtype_of
    codes = (torch.uint8, (panels, k // 8, PANEL, 4))
    scales = (panels, k // 64, PANEL)
    bias = (torch.float32, (panels, PANEL))
    if spec.family == "awq":
        return {"codes": codes, "scales": (dtype["scales"], scales), "zeros": (dtype["zeros"], scales), "bias": bias}
    low_rank = dtype.get("lora_up", torch.bfloat16)
    return {
        "codes": codes,
        "scales": (dtype["wscales"], scales),
        "up": (low_rank, (panels, rank // 2, PANEL, 2)),
        "down": (low_rank, (k // 2, rank, 2)),
        "inv_smooth": (torch.float32, (k,)),
        "bias": bias,
        "smooth": (torch.float32, (k,)),
    }


def fill(weight: CanonicalLinear | AwqWeight, parts: dict[str, Tensor]) -> None:
    """Tile every tensor of `weight` into its section, which holds zeros."""
    if isinstance(weight, AwqWeight):
        parts["codes"].copy_(_tile_codes(split_nibbles(weight.codes)))
        parts["scales"].copy_(_tile_rows(weight.scales))
        parts["zeros"].copy_(_tile_rows(weight.zeros))
    else:
        _fill_linear(weight, parts)
    if weight.bias is not None:
        parts["bias"].view(-1)[: weight.n].copy_(weight.bias)


def _fill_linear(linear: CanonicalLinear, parts: dict[str, Tensor]) -> None:
    parts["codes"].copy_(_tile_codes(split_nibbles(linear.codes) ^ _SIGN))
    parts["scales"].copy_(_tile_rows(linear.wscales))
    if linear.lora_down is not None and linear.lora_up is not None:
        parts["up"].copy_(_tile_rows(linear.lora_up).unflatten(1, (-1, 2)).transpose(2, 3))
        parts["down"].copy_(linear.lora_down.unflatten(1, (-1, 2)).permute(1, 0, 2))
    smooth = torch.ones(linear.k) if linear.smooth is None else linear.smooth.float()
    parts["smooth"].copy_(smooth)
    parts["inv_smooth"].copy_(1.0 / smooth)


def read(spec: Spec, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the canonical form; those that the layer lacks may be among them."""
    n, codes = spec.n, _untile_codes(parts["codes"], spec.n)
    if spec.family == "awq":
        tensors = {name: _untile_rows(parts[name], n) for name in ("scales", "zeros")} | {"codes": join_nibbles(codes)}
    else:
        tensors = {
            "codes": join_nibbles(codes ^ _SIGN),
            "wscales": _untile_rows(parts["scales"], n),
            "smooth": parts["smooth"],
            "lora_up": _untile_rows(parts["up"].transpose(2, 3).flatten(1, 2), n),
            "lora_down": parts["down"].permute(1, 0, 2).flatten(1),
        }
    return tensors | {"bias": parts["bias"].flatten()[:n]}


def _tile_rows(rows: Tensor) -> Tensor:
    """(N, C) -> (panels, C, 16), zeros past N."""
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2)


def _untile_rows(tiles: Tensor, n: int) -> Tensor:
    return tiles.transpose(1, 2).flatten(0, 1)[:n]


def _tile_codes(nibbles: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (panels, K/8, 16, 4) bytes: low nibble input 8b+j, high nibble input 8b+4+j."""
    padded = F.pad(nibbles, (0, 0, 0, -nibbles.shape[0] % PANEL))
    blocks = padded.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, PANEL)).permute(0, 2, 1, 4, 3)
    return blocks[..., 0] | (blocks[..., 1] << 4)


def _untile_codes(tiles: Tensor, n: int) -> Tensor:
    blocks = torch.stack((tiles & 15, tiles >> 4), dim=-1).permute(0, 2, 1, 4, 3)
    return blocks.reshape(-1, tiles.shape[1] * 8)[:n]
