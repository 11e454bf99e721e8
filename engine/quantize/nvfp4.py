"""Round a weight to NVFP4: e2m1 codes, an e4m3 scale for each 16 inputs and one scale for the tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["E2M1", "GROUP", "TOPS", "round_nvfp4"]

GROUP = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E4M3_MAX = 448.0
# Half-way points between neighbouring magnitudes.
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# "Four over six": a group whose largest value maps to 4 instead of 6 has finer steps near its top.
TOPS = (6.0, 5.0, 4.0)


def round_nvfp4(
    weight: Tensor, importance: Tensor, dtype: torch.dtype, tops: Sequence[float] = TOPS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round `weight` (N, K); returns codes uint8 (N, K) 0..15 (bit 3 is the sign), scales e4m3 (N, K/16), the tensor
    scale (1) and the rounded weight. `tops` are the codes that a group's largest value may map to; each group keeps the
    scale with the least squared error weighted by `importance` (K), the mean square of the input channel.
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    cost = importance.float()[None].unflatten(-1, (-1, GROUP))
    tensor_scale = (groups.abs().max() / 6 / _E4M3_MAX).to(dtype).float().clamp_min(torch.finfo(torch.float32).tiny)
    largest = groups.abs().amax(-1, keepdim=True) / tensor_scale
    best_error = torch.full_like(largest, torch.inf)
    best_codes, best_scales = torch.zeros_like(groups, dtype=torch.uint8), torch.ones_like(largest)
    for top in tops:
        scales = (largest / top).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        codes = _nearest(groups / (scales * tensor_scale))
        error = (cost * (groups - _values(codes) * scales * tensor_scale) ** 2).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes, best_scales = torch.where(better, codes, best_codes), torch.where(better, scales, best_scales)
    rounded = (_values(best_codes) * best_scales * tensor_scale).reshape(weight.shape)
    return (
        best_codes.reshape(weight.shape),
        best_scales.squeeze(-1).to(torch.float8_e4m3fn),
        tensor_scale.reshape(1).to(dtype),
        rounded,
    )


def _nearest(values: Tensor) -> Tensor:
    bounds = torch.tensor(_BOUNDS, device=values.device)
    # An exact tie goes to the lower magnitude, as in the published writer.
    magnitude = torch.bucketize(values.abs().contiguous(), bounds, right=False).to(torch.uint8)
    return magnitude | (values.signbit().to(torch.uint8) << 3)


def _values(codes: Tensor) -> Tensor:
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.long()]
