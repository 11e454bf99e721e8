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
