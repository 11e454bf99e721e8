"""Plain rounding to nearest and nothing else: what every stage of the quantizer is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quantize.nvfp4 import E2M1

__all__ = ["naive_error"]

_AWQ_GROUP = 64


def naive_error(weight: Tensor, rows: Tensor, kind: str, precision: str) -> float:
    """Round to nearest and nothing else: the weight, and for a layer with 4-bit activations its input too.

    Inputs are rounded as W4A4 runs them here, to integers in groups of 64 whatever the weight's type is.
    """
    rows = rows.float()
    if kind == "awq":
        return _relative(rows @ (_affine(weight) - weight).T, rows @ weight.T)
    rounded = _e2m1(weight) if precision == "nvfp4" else _int4(weight)
    return _relative(_int4(rows) @ rounded.T - rows @ weight.T, rows @ weight.T)


def _int4(values: Tensor) -> Tensor:
    groups = _grouped(values, 64)
    scale = _positive(groups.abs().amax(-1, keepdim=True) / 7)
    return _flat((groups / scale).round() * scale, values)


def _e2m1(values: Tensor) -> Tensor:
    groups = _grouped(values, 16)
    scale = _positive(groups.abs().amax(-1, keepdim=True) / 6)
    levels = torch.tensor(E2M1, device=values.device)
    nearest = (groups.abs() / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return _flat(levels[nearest] * groups.sign() * scale, values)


def _affine(weight: Tensor) -> Tensor:
    groups = _grouped(weight, _AWQ_GROUP)
    low = groups.amin(-1, keepdim=True)
    scale = _positive((groups.amax(-1, keepdim=True) - low) / 15)
    return _flat(((groups - low) / scale).round() * scale + low, weight)


def _grouped(values: Tensor, size: int) -> Tensor:
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(-1, (-1, size))


def _flat(groups: Tensor, like: Tensor) -> Tensor:
    return groups.flatten(-2)[:, : like.shape[1]]


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _relative(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm().clamp_min(1e-12))
