"""The tiling "wgmma64": 4-bit weights in the order in which Hopper's warpgroups feed them to the matrix units.

A block of 64 outputs and 64 inputs is 2048 bytes, 16 for each of a warpgroup's 128 threads: four words a0..a3. Thread
t (warp w = t / 32, lane l = t % 32) holds in word a (r = a % 2, h = a / 2) the codes of output 16 w + l / 4 + 8 r and
of inputs 16 h + 4 (l % 4) + 0..3, once of the block's first 32 inputs and once of its last. A code is a sign and
three bits of magnitude. The first four sit in bits 7 and 2..0 of the word's bytes; the last four are placed so that
the word turned right by four bits shows them in the same way. As e4m3 such a byte is the code times 2^-9, exactly: no
table, no arithmetic. A code of -8 has no such form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.canonical import CanonicalLinear, join_nibbles, split_nibbles

if TYPE_CHECKING:
    from engine.ops.spec import Shapes, Spec

__all__ = ["BLOCK", "GRAIN", "fill", "read", "shapes", "takes", "tile_codes", "tile_scales", "untile_codes",
           "untile_scales"]  # fmt: skip

BLOCK = 64  # outputs, and inputs, of a block
GRAIN = 128  # outputs and inputs are padded to multiples of this


def takes(linear: CanonicalLinear) -> bool:
    """Whether the tiling can hold `linear`: no code of -8, and a low-rank branch in bfloat16."""
    if linear.lora_down is not None and linear.lora_down.dtype != torch.bfloat16:
        return False
    return linear.kind == "nvfp4" or not bool((split_nibbles(linear.codes) == 8).any())


def shapes(spec: Spec) -> Shapes:
    """Sections in the order of LinearFp8 and QuantizeTarget in csrc/cuda/kernels.h; `smooth` is for the way back."""
    n, k = (-(-size // GRAIN) * GRAIN for size in (spec.n, spec.k))
    dtype, nvfp4 = spec.dtype_of, spec.dtype_of["wscales"] == torch.float8_e4m3fn
    # NVFP4's own factors are for the way back, and so is a row's largest scale without them (with them: row_most).
    factors = {"wtscale": (1,), "wcscales": (n,)}
    return {
        "codes": (torch.uint8, (n // BLOCK, k // BLOCK, 128, 16)),
        "scales": (dtype["wscales"], (n // BLOCK, k // BLOCK, *((4,) if nvfp4 else ()), BLOCK)),
        "up": (torch.bfloat16, (n, spec.rank)),
        "down": (torch.bfloat16, (spec.k // 32, spec.rank // 16, 2, 8, 4, 2, 2, 2)),
        "inv_smooth": (torch.float32, (spec.k,)),
        "bias": (torch.float32, (n,)),
        "row_most": (torch.float32, (n,)),
        "smooth": (torch.float32, (spec.k,)),
        **({"raw_most": (torch.float32, (n,))} if nvfp4 else {}),
        **{name: (dtype[name], shape) for name, shape in factors.items() if name in dtype},
    }


def fill(linear: CanonicalLinear, parts: dict[str, Tensor]) -> None:
    """Tile every tensor of `linear` into its section, which holds zeros."""
    nvfp4, most = linear.kind == "nvfp4", linear.wscales.float().abs().amax(1)
    parts["codes"].copy_(tile_codes(split_nibbles(linear.codes), e2m1=nvfp4))
    parts["scales"].copy_(tile_scales(linear.wscales))
    if nvfp4:
        parts["raw_most"][: linear.n].copy_(most)
        for name in ("wtscale", "wcscales"):
            factor = getattr(linear, name)
            if factor is not None:
                parts[name][: len(factor)].copy_(factor)
                most = most * factor.float()
    parts["row_most"][: linear.n].copy_(most)
    smooth = torch.ones_like(parts["smooth"]) if linear.smooth is None else linear.smooth.float()
    parts["smooth"].copy_(smooth)
    parts["inv_smooth"].copy_(1.0 / smooth)
    if linear.bias is not None:
        parts["bias"][: linear.n].copy_(linear.bias)
    if linear.lora_down is not None and linear.lora_up is not None:
        parts["up"][: linear.n].copy_(linear.lora_up)
        parts["down"].copy_(tile_down(linear.lora_down))


def read(spec: Spec, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the canonical form; those that the layer lacks may be among them."""
    n, k = spec.n, spec.k
    factors = {name: parts[name][:size] for name, size in (("wtscale", 1), ("wcscales", n)) if name in parts}
    return factors | {
        "codes": join_nibbles(untile_codes(parts["codes"], n, k, e2m1="raw_most" in parts)),
        "wscales": untile_scales(parts["scales"], n, k),
        "smooth": parts["smooth"],
        "lora_up": parts["up"][:n],
        "lora_down": parts["down"].permute(DOWN_BACK).reshape(spec.rank, k),
        "bias": parts["bias"][:n],
    }


def tile_down(down: Tensor) -> Tensor:
    """(R, K) -> (K/32, R/16, 2, 8, 4, 2, 2, 2): 32 inputs and 16 ranks are two operands of a warp, four words a lane.

    Of operand h lane 4 g + q has, in word 2 p + r, rank 8 r + g and of the eight inputs from 8 q on the pair 2 h + p.
    """
    rank, k = down.shape
    # R/16, r, g, K/32, q, h, p and the pair's element
    return down.reshape(rank // 16, 2, 8, k // 32, 4, 2, 2, 2).permute(3, 0, 5, 2, 4, 6, 1, 7)


DOWN_BACK = (1, 6, 3, 0, 4, 2, 5, 7)  # undoes tile_down's order


def tile_codes(nibbles: Tensor, e2m1: bool = False) -> Tensor:
    """Codes (N, K) of 0..15 -> (N/64, K/64, 128, 16) bytes, zero codes in the padding.

    They are two's complement, or e2m1 as it is: a sign and three bits.
    """
    n, k = nibbles.shape
    codes = F.pad(nibbles, (0, -k % GRAIN, 0, -n % GRAIN))
    #  block, warp, r, l / 4; block, step, h, l % 4, byte -> block, block, warp, l / 4, l % 4, h, r, byte; step last
    split = codes.view(codes.shape[0] // BLOCK, 4, 2, 8, codes.shape[1] // BLOCK, 2, 2, 4, 4)
    ordered = split.permute(0, 4, 1, 3, 7, 6, 2, 8, 5)
    negative, magnitude = (
        ordered >> 3,
        ordered & 7 if e2m1 else ((ordered ^ 8).to(torch.int8) - 8).abs().to(torch.uint8),
    )
    first = magnitude[..., 0] | (negative[..., 0] << 7)
    # Magnitudes of the second step go to bits 6..4; signs to bit 3 of the next byte, which the turn brings to bit 7.
    second = (magnitude[..., 1] << 4) | (negative[..., 1].roll(1, -1) << 3)
    return (first | second).reshape(*split.shape[:1], split.shape[4], 128, 16)


def untile_codes(tiles: Tensor, n: int, k: int, e2m1: bool = False) -> Tensor:
    """The inverse of tile_codes: codes (N, K) of 0..15."""
    words = tiles.reshape(tiles.shape[0], tiles.shape[1], 4, 8, 4, 2, 2, 4)
    magnitude = torch.stack((words & 7, (words >> 4) & 7), -1)
    negative = torch.stack((words >> 7, ((words >> 3) & 1).roll(-1, -1)), -1)
    signed = magnitude.to(torch.int8) * (1 - 2 * negative.to(torch.int8))
    codes = magnitude | negative << 3 if e2m1 else signed.view(torch.uint8) & 15
    split = codes.permute(0, 2, 6, 3, 1, 8, 5, 4, 7)
    return split.reshape(tiles.shape[0] * BLOCK, tiles.shape[1] * BLOCK)[:n, :k]


def tile_scales(scales: Tensor) -> Tensor:
    """(N, K/64) -> (N/64, K/64, 64), and e4m3 (N, K/16) -> (N/64, K/64, 4, 64); zeros in the padding."""
    if scales.dtype == torch.float8_e4m3fn:
        padded = F.pad(scales.view(torch.uint8), (0, -scales.shape[1] % 8, 0, -scales.shape[0] % GRAIN))
        split = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1)
        return split.contiguous().view(torch.float8_e4m3fn)
    n, groups = scales.shape
    padded = F.pad(scales, (0, groups % 2, 0, -n % GRAIN))
    return padded.unflatten(0, (-1, BLOCK)).transpose(1, 2)


def untile_scales(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of tile_scales."""
    if tiles.dtype == torch.float8_e4m3fn:
        rows = tiles.view(torch.uint8).permute(0, 3, 1, 2).flatten(2).flatten(0, 1)[:n, : k // 16]
        return rows.contiguous().view(torch.float8_e4m3fn)
    return tiles.transpose(1, 2).flatten(0, 1)[:n, : k // BLOCK]
