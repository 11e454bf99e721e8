"""A published checkpoint read as if it were a canonical one: same names, same shapes, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint.files import TensorFiles, all_finite, check_keys
from engine.checkpoint.pieces import Piece, Stored
from engine.checkpoint.quantization import RECORDS
from engine.errors import CheckpointError

__all__ = ["PublishedSource", "Source", "check_stored", "header_dtype"]

_HEADER_NAMES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Source(Protocol):
    """Canonical tensors by name, read when asked for. TensorFiles and PublishedSource are such."""

    path: Path
    metadata: dict[str, str]

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def close(self) -> None: ...


class PublishedSource:
    """The canonical view of the files of a published checkpoint made of `pieces`.

    `metadata` is that of the canonical form. `exact` holds canonical tensors that the published form rounds and that
    its writer therefore put into the metadata. Tensors of the layer read last are kept, since callers ask by layer.
    Raises CheckpointError when stored names, shapes or dtypes are not those of `pieces`.
    """

    def __init__(
        self,
        files: TensorFiles,
        pieces: Sequence[Piece],
        metadata: Mapping[str, str],
        exact: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_stored(files, pieces)
        self.files, self.pieces = files, tuple(pieces)
        self.path = files.path
        self.metadata = dict(metadata)
        self._exact = dict(exact or {})
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._owner: dict[str, Piece] = {}
        for piece in self.pieces:
            for name, shape in (piece.canonical() | self._present(piece)).items():
                self._shapes[name], self._owner[name] = shape, piece
        self._last: tuple[Piece, dict[str, Tensor]] | None = None

    def __enter__(self) -> PublishedSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files and of the layer read last."""
        self._last = None
        self.files.close()

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a canonical tensor; nothing is read."""
        return self._shapes[name]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._owner:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        piece = self._owner[name]
        if self._last is None or self._last[0] is not piece:
            self._last = None
            self._last = (piece, self.decode(piece, self.read(piece)))
        return self._last[1][name]

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """The stored tensors of a piece; raises CheckpointError when one holds NaN or infinity."""
        raw = {name: self.files[name] for name in piece.stored() if name in self.files}
        for name, tensor in raw.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise CheckpointError(
                    f"{self.path}: {name} holds NaN or infinity; the file is damaged: fetch or make it again"
                )
            if name.endswith((".smooth", ".smooth_factor")) and not bool(tensor.all()):
                raise CheckpointError(f"{self.path}: {name} holds a zero, by which inputs would be divided")
        return raw

    def decode(self, piece: Piece, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors of a piece from its stored ones, with exact values from the metadata."""
        tensors = piece.decode(raw)
        for name in self._exact.keys() & tensors.keys():
            exact = self._exact[name].to(tensors[name].device)
            if _agree(tensors[name], exact, raw):
                tensors[name] = exact
        return tensors

    def _present(self, piece: Piece) -> dict[str, tuple[int, ...]]:
        """Optional canonical tensors that this file has; only small tensors are looked at."""
        optional = piece.optional()
        if not optional:
            return {}
        small = {
            name: self.files[name] for name in piece.stored() if name in self.files and len(self.files.shape(name)) == 1
        }
        there = piece.present(small)
        return {name: shape for name, shape in optional.items() if name in there}


def check_stored(files: TensorFiles, pieces: Sequence[Piece]) -> None:
    """Raise CheckpointError unless the files hold exactly the tensors of `pieces`, with their shapes and dtypes."""
    wanted: dict[str, Stored] = {}
    for piece in pieces:
        wanted |= piece.stored()
    found = {name for name in files if not name.startswith(RECORDS)}
    optional = {name for name, stored in wanted.items() if not stored.required}
    check_keys(files.path, found - optional, wanted.keys() - optional)
    for name in sorted(found):
        shape, stored = files.shape(name), wanted[name]
        if not stored.fits(shape):
            _complain(files, name, shape, stored)
        dtype = header_dtype(files, name)
        if dtype not in stored.dtypes:
            allowed = " or ".join(str(kind).removeprefix("torch.") for kind in stored.dtypes)
            raise CheckpointError(f"{files.path}: {name} is {files.dtype(name)}, expected {allowed}")


def header_dtype(files: TensorFiles, name: str) -> torch.dtype | None:
    """Dtype of a stored tensor, None when torch has no such one."""
    return _HEADER_NAMES.get(files.dtype(name))


def _complain(files: TensorFiles, name: str, shape: tuple[int, ...], stored: Stored) -> None:
    if len(shape) == 2 and shape[0] == stored.shape[0] and "lora_" in name.rpartition(".")[2]:
        raise CheckpointError(f"{files.path}: {name} has rank {shape[1]}, but the checkpoint says {stored.shape[1]}")
    raise CheckpointError(f"{files.path}: {name} has shape {shape}, expected {stored.shape}")


def _agree(decoded: Tensor, exact: Tensor, raw: Mapping[str, Tensor]) -> bool:
    """Whether the exact value still belongs to what is stored: a tool may have changed one and not the other."""
    if decoded.shape != exact.shape:
        return False
    size = max(float(tensor.abs().max()) for name, tensor in raw.items() if name.endswith(".bias"))
    return float((decoded.double() - exact.double()).abs().max()) <= 2.0**-6 * size
