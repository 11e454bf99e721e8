"""The tiling "plain": the canonical tensors one after another, as the reference backend reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.ops.canonical import AwqWeight, CanonicalLinear
    from engine.ops.spec import Shapes, Spec

__all__ = ["fill", "read", "shapes"]


def shapes(spec: Spec) -> Shapes:
    """Every tensor that is present, in the order of its name in the key."""
    n, k, rank = spec.n, spec.k, spec.rank
    group = 16 if spec.dtype_of.get("wscales") == torch.float8_e4m3fn else 64
    of = {
        "codes": (n, k // 2), "wscales": (n, k // group), "scales": (n, k // group), "zeros": (n, k // group),
        "smooth": (k,), "lora_down": (rank, k), "lora_up": (n, rank), "bias": (n,), "wtscale": (1,), "wcscales": (n,),
    }  # fmt: skip
    return {name: (dtype, of[name]) for name, dtype in spec.dtype_of.items()}


def fill(weight: CanonicalLinear | AwqWeight, parts: dict[str, Tensor]) -> None:
    """Copy every tensor of `weight` to its section."""
    for name, part in parts.items():
        part.copy_(getattr(weight, name))


def read(_spec: Spec, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the canonical form: the sections themselves."""
    return parts
