"""What a layer's one buffer holds and where: the sizes, the tiling, and a section for each tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from engine.ops import mma64, panel16, plain, wgmma64

__all__ = ["DTYPE_NAMES", "FIELDS", "Section", "Shapes", "Spec", "parse"]

Shapes: TypeAlias = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The sections of a tiling in order: dtype and shape of each."""

ALIGN = 64
_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn, "u8": torch.uint8
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TILINGS = {"reference": plain, "sm90a": wgmma64, "sm120a": mma64}
# Which tensors of a canonical weight travel, in this order, with their dtype (or "-") in the key.
FIELDS = {
    "svdq": ("codes", "wscales", "smooth", "lora_down", "lora_up", "bias", "wtscale", "wcscales"),
    "awq": ("codes", "scales", "zeros", "bias"),
}


@dataclass(frozen=True)
class Section:
    """Where one tensor lies in the buffer: byte offset, dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the next section begins."""
        return self.offset + -(-self.nbytes // ALIGN) * ALIGN

    def of(self, blob: Tensor) -> Tensor:
        """View this section of `blob`."""
        return blob[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Spec:
    """What a buffer holds. `key` says it as one string, which is how it travels through torch.library."""

    family: str
    backend: str
    n: int
    k: int
    rank: int
    dtypes: tuple[str, ...]
    key: str = field(init=False, compare=False)  # svdq/avx512/3072/3072/32/u8,bf16,bf16,bf16,bf16,bf16,-,-

    def __post_init__(self) -> None:
        # Not a cached_property: torch.compile cannot trace the lock that those hold before Python 3.12.
        key = f"{self.family}/{self.backend}/{self.n}/{self.k}/{self.rank}/{','.join(self.dtypes)}"
        object.__setattr__(self, "key", key)

    @property
    def tiling(self) -> ModuleType:
        """The module that fills such a buffer and reads it: plain, panel16, wgmma64 or mma64."""
        return _TILINGS.get(self.backend, panel16)

    @cached_property
    def dtype_of(self) -> dict[str, torch.dtype]:
        """Canonical dtype of each tensor that is present."""
        pairs = zip(FIELDS[self.family], self.dtypes, strict=True)
        return {field: _DTYPES[name] for field, name in pairs if name != "-"}

    @cached_property
    def sections(self) -> dict[str, Section]:
        """Every section of the buffer, in order."""
        sections, offset = {}, 0
        for name, (dtype, shape) in self.tiling.shapes(self).items():
            sections[name] = Section(offset, dtype, shape)
            offset = sections[name].end
        return sections

    def views(self, blob: Tensor) -> dict[str, Tensor]:
        """Every section of `blob` by name."""
        return {name: section.of(blob) for name, section in self.sections.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return list(self.sections.values())[-1].end


@lru_cache(maxsize=4096)
def parse(key: str) -> Spec:
    """The inverse of Spec.key. Cached: the same key gives the same object."""
    family, backend, n, k, rank, dtypes = key.split("/")
    return Spec(family, backend, int(n), int(k), int(rank), tuple(dtypes.split(",")))
