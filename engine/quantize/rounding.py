"""Round a weight to 4-bit codes with one 16-bit scale for each row and 64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize import fused

__all__ = ["GROUP", "pack_nibbles", "round_affine", "round_int4"]

GROUP = 64
_RATIOS = torch.linspace(0.70, 1.0, 13).tolist()


def pack_nibbles(codes: Tensor) -> Tensor:
    """codes (N, K) in -8..7 or 0..15 -> uint8 (N, K/2), the even input in the low nibble."""
    low, high = codes[:, 0::2].to(torch.uint8) & 15, codes[:, 1::2].to(torch.uint8) & 15
    return low | (high << 4)


def round_int4(
    weight: Tensor, importance: Tensor, dtype: torch.dtype, *, search: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Round `weight` (N, K) to signed codes -7..7; returns codes int8 (N, K), scales (N, K/64) and the rounded weight.

    Each group tries several clipping ratios of its largest value and keeps the one with the least squared error
    weighted by `importance` (K), the mean square of the input channel; then the scale is refitted to its codes. Without
    `search` the largest value of a group is the largest code.
    """
    if search and fused.takes(weight):
        return fused.round_int4(weight.float(), importance.float(), dtype)
    groups, cost = _grouped(weight), _grouped(importance[None])
    largest = groups.abs().amax(-1, keepdim=True)
    best = _Best(groups)
    for ratio in _RATIOS if search else (1.0,):
        best.offer(*_round_at(groups, largest * (ratio / 7), cost, dtype))
    if search:
        # Least squares for the codes just chosen: the scale that explains the group best.
        fitted = (cost * groups * best.codes).sum(-1, keepdim=True) / (cost * best.codes**2).sum(-1, keepdim=True)
        best.offer(*_round_at(groups, torch.where(fitted.isfinite(), fitted, best.scales), cost, dtype))
    rounded = (best.codes * best.scales).reshape(weight.shape)
    return best.codes.reshape(weight.shape).to(torch.int8), best.scales.squeeze(-1).to(dtype), rounded


def round_affine(
    weight: Tensor, importance: Tensor, dtype: torch.dtype, *, group: int = GROUP, search: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round `weight` (N, K) to code * scale + zero with codes 0..15 and a pair for each `group` (weight-only layers).

    Returns codes uint8 (N, K), scales and zeros (N, K/group) and the rounded weight.
    """
    groups, cost = _grouped(weight, group), _grouped(importance[None], group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, half = (high + low) / 2, (high - low) / 2
    best_error = torch.full_like(low, torch.inf)
    best = (torch.zeros_like(groups), torch.ones_like(low), torch.zeros_like(low))
    for ratio in _RATIOS if search else (1.0,):
        scale = _positive((half * ratio * 2 / 15).to(dtype).float())
        zero = (middle - half * ratio).to(dtype).float()
        codes = ((groups - zero) / scale).round().clamp(0, 15)
        error = (cost * (groups - codes * scale - zero) ** 2).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(torch.where(better, new, old) for new, old in zip((codes, scale, zero), best, strict=True))
    codes, scale, zero = best
    rounded = (codes * scale + zero).reshape(weight.shape)
    return (
        codes.reshape(weight.shape).to(torch.uint8),
        scale.squeeze(-1).to(dtype),
        zero.squeeze(-1).to(dtype),
        rounded,
    )


class _Best:
    """The codes and scales with the least error so far, group by group."""

    def __init__(self, groups: Tensor) -> None:
        self.codes = torch.zeros_like(groups)
        self.scales = torch.ones_like(groups[..., :1])
        self.error = torch.full_like(self.scales, torch.inf)

    def offer(self, codes: Tensor, scales: Tensor, error: Tensor) -> None:
        better = error < self.error
        self.codes = torch.where(better, codes, self.codes)
        self.scales = torch.where(better, scales, self.scales)
        self.error = torch.where(better, error, self.error)


def _round_at(groups: Tensor, scales: Tensor, cost: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    # The scale is rounded first, so the codes are chosen for the value that will be stored.
    scales = _positive(scales.to(dtype).float())
    codes = (groups / scales).round().clamp(-7, 7)  # as published files: kernels may hold a code as sign and magnitude
    error = (cost * (groups - codes * scales) ** 2).sum(-1, keepdim=True)
    return codes, scales, error


def _grouped(matrix: Tensor, size: int = GROUP) -> Tensor:
    return matrix.float().unflatten(-1, (-1, size))


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))
