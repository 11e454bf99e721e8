"""What one layer of a published checkpoint is made of, and how it becomes canonical tensors and back.

A layout is a list of pieces. Each piece owns some stored tensors and some canonical ones, says which shapes the
stored ones must have, and translates in both directions. Both directions are exact, apart from biases that the
published form rounds (see engine.checkpoint.biases).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError

__all__ = ["FLOAT16", "FLOATS", "FP8", "Copy", "Piece", "Stored", "Tensors", "same_bits", "take"]

FLOAT16 = (torch.bfloat16, torch.float16)
FLOATS = (*FLOAT16, torch.float32)
FP8 = (torch.float8_e4m3fn,)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """One stored tensor: its shape (-1 in the first place: at least the rows that are used) and allowed dtypes."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    required: bool = True
    at_least: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of `shape` may stand here."""
        if self.at_least and len(shape) == len(self.shape):
            return shape[0] >= self.shape[0] and shape[1:] == self.shape[1:]
        return shape == self.shape


class Piece(Protocol):
    """One layer, or one tensor, of a published checkpoint."""

    def stored(self) -> dict[str, Stored]:
        """Names and shapes of the stored tensors."""
        ...

    def canonical(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the canonical tensors that every checkpoint of this layout has."""
        ...

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of canonical tensors that may be there."""
        ...

    def present(self, small: Tensors) -> set[str]:
        """Which of the optional ones `decode` will give; `small` holds the stored 1-D tensors."""
        ...

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        """Stored tensors, by stored name, to canonical ones."""
        ...

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        """Canonical tensors to stored ones."""
        ...


@dataclass(frozen=True)
class Copy:
    """A 16-bit tensor that only changes its name."""

    source: str
    name: str
    shape: tuple[int, ...]

    def stored(self) -> dict[str, Stored]:
        return {self.source: Stored(self.shape, FLOATS)}

    def canonical(self) -> dict[str, tuple[int, ...]]:
        return {self.name: self.shape}

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        return {self.name: raw[self.source]}

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        return {self.source: take(tensors, self.name, self.shape)}


def take(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Tensor:
    """`tensors[name]`, which must have `shape`; raises CheckpointError."""
    if name not in tensors:
        raise CheckpointError(f"{name} is missing, so this checkpoint cannot be written in the published layout")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    return tensor


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether dtype, shape and every bit agree (NaN equals itself, 0 differs from -0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right))
    return left.equal(right)
