"""Bit layouts of the published 4-bit checkpoints, and their plain row-major forms.

Every stored layout is a permutation of the plain one: the buffer is viewed with one axis a factor of the index
arithmetic, and the axes are transposed. Letters: N out, K in, G groups, R rank; within an index, `t` counts tiles.
Nothing is expanded to one code a byte, so a layer needs no more memory than its packed form.

Plain forms: codes uint8 (N, K/2), low nibble = even k; scales (N, G); lora_down (R, K); lora_up (N, R).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import ArgumentError

__all__ = [
    "TILE",
    "pack_awq_codes",
    "pack_codes",
    "pack_lora_down",
    "pack_lora_up",
    "pack_micro_scales",
    "pack_scales",
    "pack_vector",
    "pad",
    "round_up",
    "unpack_awq_codes",
    "unpack_codes",
    "unpack_lora_down",
    "unpack_lora_up",
    "unpack_micro_scales",
    "unpack_scales",
    "unpack_vector",
]

TILE = 128
_RANK_TILE = 16
_AWQ_ROWS = 256


def round_up(value: int, multiple: int = TILE) -> int:
    """Smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def pad(tensor: Tensor, shape: Sequence[int], value: float = 0) -> Tensor:
    """Grow `tensor` at the end of each axis to `shape`, filled with `value`; unchanged when it fits already."""
    if tuple(tensor.shape) == tuple(shape):
        return tensor
    grown = torch.full(tuple(shape), value, dtype=torch.float32, device=tensor.device).to(tensor.dtype)
    # float8 has no slice assignment on every torch, its bytes have.
    _bits(grown)[tuple(slice(0, size) for size in tensor.shape)] = _bits(tensor)
    return grown


def unpack_codes(stored: Tensor) -> Tensor:
    """qweight int8 (N, K/2) in tensor-core order -> codes uint8 (N, K/2)."""
    n, k = stored.shape[0], stored.shape[1] * 2
    _demand("qweight", (n, TILE), (k, TILE))
    # word index [nt][kt][p][q][c][h][u] with n = 128 nt + 16 p + 8 h + q and k = 64 kt + 32 u + 8 c + j
    words = stored.contiguous().view(torch.int32).view(n // 128, k // 64, 8, 8, 4, 2, 2)
    return words.permute(0, 2, 5, 3, 1, 6, 4).reshape(n, k // 8).view(torch.uint8)


def pack_codes(codes: Tensor) -> Tensor:
    """Inverse of `unpack_codes`."""
    n, k = codes.shape[0], codes.shape[1] * 2
    _demand("codes", (n, TILE), (k, TILE))
    words = codes.contiguous().view(torch.int32).view(n // 128, 8, 2, 8, k // 64, 2, 4)
    return words.permute(0, 4, 1, 3, 6, 2, 5).reshape(n, k // 8).view(torch.int8)


def unpack_scales(stored: Tensor) -> Tensor:
    """16-bit wscales (G, N) in epilogue order -> scales (N, G)."""
    g, n = stored.shape
    _demand("wscales", (n, TILE))
    # [nt][g][p][a][h][b] with n = 128 nt + 16 p + 8 h + 2 a + b
    return _transpose(stored, (n // 128, g, 8, 4, 2, 2), (0, 2, 4, 3, 5, 1)).view(n, g)


def pack_scales(scales: Tensor) -> Tensor:
    """Inverse of `unpack_scales`."""
    n, g = scales.shape
    _demand("scales", (n, TILE))
    return _transpose(scales, (n // 128, 8, 2, 4, 2, g), (0, 5, 1, 3, 2, 4)).view(g, n)


def unpack_vector(stored: Tensor) -> Tensor:
    """Bias, smooth factor or per-row scale (N) in epilogue order -> plain (N)."""
    _demand("vector", (stored.numel(), 16))
    return _transpose(stored, (-1, 4, 2, 2), (0, 2, 1, 3)).view(-1)


def pack_vector(vector: Tensor) -> Tensor:
    """Inverse of `unpack_vector`."""
    _demand("vector", (vector.numel(), 16))
    return _transpose(vector, (-1, 2, 4, 2), (0, 2, 1, 3)).view(-1)


def unpack_micro_scales(stored: Tensor) -> Tensor:
    """nvfp4 wscales e4m3 (K/16, N) -> scales (N, K/16)."""
    g, n = stored.shape
    _demand("wscales", (n, TILE), (g, 4))
    # [nt][kt][q][v][w][g % 4] with n = 128 nt + 32 w + 8 v + q and g = 4 kt + g % 4
    return _transpose(stored, (n // 128, g // 4, 8, 4, 4, 4), (0, 4, 3, 2, 1, 5)).view(n, g)


def pack_micro_scales(scales: Tensor) -> Tensor:
    """Inverse of `unpack_micro_scales`."""
    n, g = scales.shape
    _demand("scales", (n, TILE), (g, 4))
    return _transpose(scales, (n // 128, 4, 4, 8, g // 4, 4), (0, 4, 3, 2, 1, 5)).view(g, n)


def unpack_lora_down(stored: Tensor) -> Tensor:
    """lora_down (K, R) in 16x16 tiles -> (R, K)."""
    k, r = stored.shape
    _demand("lora_down", (k, _RANK_TILE), (r, _RANK_TILE))
    # [ct][it][iq][ca][ih][ch][cb] with i = 16 it + 8 ih + iq and c = 16 ct + 8 ch + 2 ca + cb
    return _transpose(stored, (k // 16, r // 16, 8, 4, 2, 2, 2), (1, 4, 2, 0, 5, 3, 6)).view(r, k)


def pack_lora_down(lora_down: Tensor) -> Tensor:
    """Inverse of `unpack_lora_down`."""
    r, k = lora_down.shape
    _demand("lora_down", (k, _RANK_TILE), (r, _RANK_TILE))
    return _transpose(lora_down, (r // 16, 2, 8, k // 16, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6)).view(k, r)


def unpack_lora_up(stored: Tensor) -> Tensor:
    """lora_up (N, R) in 16x16 tiles -> (N, R)."""
    n, r = stored.shape
    _demand("lora_up", (n, _RANK_TILE), (r, _RANK_TILE))
    # [ct][it][cq][ia][ch][ih][ib] with c = 16 ct + 8 ch + cq and i = 16 it + 8 ih + 2 ia + ib
    return _transpose(stored, (n // 16, r // 16, 8, 4, 2, 2, 2), (0, 4, 2, 1, 5, 3, 6)).view(n, r)


def pack_lora_up(lora_up: Tensor) -> Tensor:
    """Inverse of `unpack_lora_up`."""
    n, r = lora_up.shape
    _demand("lora_up", (n, _RANK_TILE), (r, _RANK_TILE))
    return _transpose(lora_up, (n // 16, 2, 8, r // 16, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6)).view(n, r)


def unpack_awq_codes(stored: Tensor, chunks: int = 1) -> Tensor:
    """qweight int32 (N/4, K/2), or the same bytes as int16 (N/4, K) -> unsigned codes uint8 (N, K/2).

    A 16-bit word holds inputs k, k+8, k+16, k+24 of one row. With `chunks` = S the stored rows are interleaved
    (stored row d*S + s is row s*(N/S) + d) and come back chunk by chunk.
    """
    words = stored.contiguous().view(torch.int16)
    n, k = words.shape[0] * 4, words.shape[1]
    _demand("qweight", (n, 4 * chunks), (k, 64))
    codes = torch.empty((chunks, n // chunks, k // 2), dtype=torch.uint8, device=stored.device)
    # Blocks of rows that hold whole interleaved runs, since shifted words take several times the room of codes.
    block = _AWQ_ROWS * chunks
    for start in range(0, n, block):
        rows = _awq_rows(words[start // 4 : (start + block) // 4])
        run = rows.view(-1, chunks, k // 2).transpose(0, 1)
        codes[:, start // chunks : start // chunks + run.shape[1]] = run
    return codes.view(n, k // 2)


def _awq_rows(words: Tensor) -> Tensor:
    """Words int16 (N/4, K) -> codes uint8 (N, K/2), rows as stored."""
    n, k = words.shape[0] * 4, words.shape[1]
    # [nt][kt][n % 4][u][e][o]: word e, o holds k % 8 = 2 e + o of half u
    words = words.view(n // 4, k // 64, 4, 2, 4, 2)
    codes = torch.empty((n // 4, 4, k // 64, 2, 4, 4), dtype=torch.uint8, device=words.device)
    for nibble in range(4):
        part = (words >> (4 * nibble)) & 15
        both = part[..., 0] | (part[..., 1] << 4)  # [nt][kt][n % 4][u][e]
        codes[:, :, :, :, nibble] = both.permute(0, 2, 1, 3, 4)
    return codes.view(n, k // 2)


def pack_awq_codes(codes: Tensor, chunks: int = 1) -> Tensor:
    """Inverse of `unpack_awq_codes`; returns int32 (N/4, K/2)."""
    n, k = codes.shape[0], codes.shape[1] * 2
    _demand("codes", (n, 4 * chunks), (k, 64))
    rows = codes.view(chunks, n // chunks, k // 2).transpose(0, 1).reshape(n // 4, 4, k // 64, 2, 4, 4)
    words = torch.zeros((n // 4, k // 64, 4, 2, 4, 2), dtype=torch.int16, device=codes.device)
    for nibble in range(4):
        both = rows[:, :, :, :, nibble].permute(0, 2, 1, 3, 4).to(torch.int16)
        words[..., 0] |= (both & 15) << (4 * nibble)
        words[..., 1] |= (both >> 4) << (4 * nibble)
    return words.view(n // 4, k).view(torch.int32)


def _transpose(tensor: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """View with `shape`, reorder the axes, and lay the result out anew."""
    moved = _bits(tensor.contiguous()).view(shape).permute(order).contiguous()
    return moved.view(tensor.dtype)


def _bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers: moving float8 is not possible everywhere, and NaNs keep their payload."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])


def _demand(name: str, *sizes: tuple[int, int]) -> None:
    for size, multiple in sizes:
        if size == 0 or size % multiple:
            raise ArgumentError(f"{name}: expected a size that is a multiple of {multiple}, got {size}")
