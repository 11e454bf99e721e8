"""The tiling "wgmma64": 4-bit weights in the order in which Hopper's warpgroups feed them to the matrix units.

A block of 64 outputs and 64 inputs is 2048 bytes, 16 for each of a warpgroup's 128 threads: four words a0..a3. Thread
t (warp w = t / 32, lane l = t % 32) holds in word a (r = a % 2, h = a / 2) the codes of output 16 w + l / 4 + 8 r and
of inputs 16 h + 4 (l % 4) + 0..3, once of the block's first 32 inputs and once of its last. A code is a sign and
three bits of magnitude. The first four sit in bits 7 and 2..0 of the word's bytes; the last four are placed so that
the word turned right by four bits shows them in the same way. As e4m3 such a byte is the code times 2^-9, exactly: no
table, no arithmetic. A code of -8 has no such form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLOCK", "GRAIN", "fits", "tile_codes", "tile_scales", "untile_codes", "untile_scales"]

BLOCK = 64  # outputs, and inputs, of a block
GRAIN = 128  # outputs and inputs are padded to multiples of this


def fits(nibbles: Tensor) -> bool:
    """Whether two's complement `nibbles` (N, K) of 0..15 hold no -8."""
    return not bool((nibbles == 8).any())


def tile_codes(nibbles: Tensor) -> Tensor:
    """Two's complement (N, K) of 0..15 -> (N/64, K/64, 128, 16) bytes, zero codes in the padding."""
    n, k = nibbles.shape
    codes = F.pad((nibbles ^ 8).to(torch.int8) - 8, (0, -k % GRAIN, 0, -n % GRAIN))
    #  block, warp, r, l / 4; block, step, h, l % 4, byte -> block, block, warp, l / 4, l % 4, h, r, byte; step last
    split = codes.view(codes.shape[0] // BLOCK, 4, 2, 8, codes.shape[1] // BLOCK, 2, 2, 4, 4)
    ordered = split.permute(0, 4, 1, 3, 7, 6, 2, 8, 5)
    magnitude, negative = ordered.abs().to(torch.uint8), (ordered < 0).to(torch.uint8)
    first = magnitude[..., 0] | (negative[..., 0] << 7)
    # Magnitudes of the second step go to bits 6..4; signs to bit 3 of the next byte, which the turn brings to bit 7.
    second = (magnitude[..., 1] << 4) | (negative[..., 1].roll(1, -1) << 3)
    return (first | second).reshape(*split.shape[:1], split.shape[4], 128, 16)


def untile_codes(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of tile_codes: two's complement (N, K) of 0..15."""
    words = tiles.reshape(tiles.shape[0], tiles.shape[1], 4, 8, 4, 2, 2, 4)
    first = (words & 7).to(torch.int8) * (1 - 2 * (words >> 7)).to(torch.int8)
    second = ((words >> 4) & 7).to(torch.int8) * (1 - 2 * ((words >> 3) & 1).roll(-1, -1)).to(torch.int8)
    split = torch.stack((first, second), -1).permute(0, 2, 6, 3, 1, 8, 5, 4, 7)
    codes = split.reshape(tiles.shape[0] * BLOCK, tiles.shape[1] * BLOCK)[:n, :k]
    return codes.view(torch.uint8) & 15


def tile_scales(scales: Tensor) -> Tensor:
    """(N, K/64) -> (N/64, K/64, 64), zeros in the padding."""
    n, groups = scales.shape
    padded = F.pad(scales, (0, groups % 2, 0, -n % GRAIN))
    return padded.unflatten(0, (-1, BLOCK)).transpose(1, 2)


def untile_scales(tiles: Tensor, n: int, k: int) -> Tensor:
    """The inverse of tile_scales."""
    return tiles.transpose(1, 2).flatten(0, 1)[:n, : k // BLOCK]
