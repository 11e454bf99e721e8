"""A published checkpoint read as if it were a canonical one: same names, same shapes, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint.exact import Exact, checksum, is_record
from engine.checkpoint.files import TensorFiles, all_finite, check_keys
from engine.checkpoint.pieces import Piece, Stored
from engine.checkpoint.quantization import RECORDS
from engine.errors import CheckpointError

__all__ = ["FACTORS", "PublishedSource", "Source", "check_dtype", "check_stored", "check_values", "header_dtype"]

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

# Scales of a whole NVFP4 weight and of its rows: layouts spell them in different ways.
FACTORS = (".wtscale", ".wcscales")


class Source(Protocol):
    """Canonical tensors by name, read when asked for. CanonicalSource and PublishedSource are such."""

    path: Path
    metadata: dict[str, str]

    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def close(self) -> None: ...


class PublishedSource:
    """The canonical view of the files of a published checkpoint in `layout`, made of `pieces`.

    `metadata` is that of the canonical form. `exact` holds canonical vectors that the published form rounds or has no
    place for, and that its writer therefore put into the metadata. Tensors of the layer read last are kept, since
    callers ask by layer. Raises CheckpointError when stored names, shapes or dtypes are not those of `pieces`.
    """

    def __init__(
        self,
        files: TensorFiles,
        pieces: Sequence[Piece],
        metadata: Mapping[str, str],
        layout: str,
        exact: Mapping[str, Exact] | None = None,
    ) -> None:
        check_stored(files, pieces)
        self.files, self.pieces, self.layout = files, tuple(pieces), layout
        self.path = files.path
        self.metadata = dict(metadata)
        self._exact = dict(exact or {})
        self.records = {name: value for name, (value, _) in self._exact.items() if is_record(name, value)}
        self._shapes: dict[str, tuple[int, ...]] = {name: (0,) for name in self.records}
        self._owner: dict[str, Piece] = {}
        self._added: dict[str, dict[str, Tensor]] = {}
        for piece in self.pieces:
            for name, shape in self._names(piece).items():
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
        if name in self.records:
            return self.records[name]
        if name not in self._owner:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        piece = self._owner[name]
        if self._last is None or self._last[0] is not piece:
            self._last = None
            self._last = (piece, self.decode(piece, self.read(piece)))
        return self._last[1][name]

    def as_stored(self, piece: Piece, layout: str) -> dict[str, Tensor] | None:
        """What these files hold for a layer that `piece` would write in just this form; None where forms differ."""
        own = self._owner.get(_key(piece))
        if layout != self.layout or own is None or own.stored() != piece.stored():
            return None
        return self.read(own) if own.canonical() == piece.canonical() else None

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """The stored tensors of a piece; raises CheckpointError when one holds NaN or infinity."""
        raw = {name: self.files[name] for name in piece.stored() if name in self.files}
        for name, tensor in raw.items():
            check_values(self.path, name, tensor)
        return raw

    def decode(self, piece: Piece, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Canonical tensors of a piece from its stored ones, with exact values from the metadata."""
        tensors = piece.decode(raw)
        added = self._added.get(_key(piece), {})
        if added:
            like = next(iter(tensors.values())).device
            spelled = {name.rpartition(".")[0] for name in added if name.endswith(FACTORS)}
            tensors = {
                n: t for n, t in tensors.items() if not (n.endswith(FACTORS) and n.rpartition(".")[0] in spelled)
            }
            tensors |= {name: value.to(like) for name, value in added.items() if value.numel()}
            _take_apart(tensors, added)
        for name in self._exact.keys() & (tensors.keys() - added.keys()):
            exact = self._exact[name].value.to(tensors[name].device)
            if _agree(tensors[name], exact, raw):
                tensors[name] = exact
        return tensors

    def exact_of(self, piece: Piece) -> dict[str, Exact]:
        """What the metadata holds for the tensors of a piece."""
        names = piece.canonical().keys() | piece.optional().keys()
        return {name: self._exact[name] for name in names & self._exact.keys()}

    def _names(self, piece: Piece) -> dict[str, tuple[int, ...]]:
        """Canonical tensors that this file has of a piece, with their shapes; only stored vectors are looked at."""
        shapes, optional = piece.canonical(), piece.optional()
        if not optional:
            return shapes
        small = {
            name: self.files[name] for name in piece.stored() if name in self.files and len(self.files.shape(name)) == 1
        }
        there = piece.present(small)
        shapes |= {name: shape for name, shape in optional.items() if name in there}
        added = self._fitting(shapes, optional, small)
        if added:
            self._added[_key(piece)] = added
            shapes = _without_factors(shapes, added) | {
                name: optional[name] for name, value in added.items() if value.numel()
            }
        return shapes

    def _fitting(
        self, there: Mapping[str, Any], optional: Mapping[str, tuple[int, ...]], small: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Vectors from the metadata that the stored form lacks or spells otherwise, as far as they belong to it."""
        mine = {name: self._exact[name] for name in optional if name in self._exact}
        mine = {name: found for name, found in mine.items() if name not in there or name.endswith(FACTORS)}
        crc = checksum(small) if mine else 0
        return {
            name: value
            for name, (value, belongs) in mine.items()
            if belongs == crc and tuple(value.shape) in (optional[name], (0,))
        }


def _key(piece: Piece) -> str:
    return next(iter(piece.canonical()))


def _without_factors(found: Mapping[str, Any], added: Mapping[str, Tensor]) -> dict[str, Any]:
    """`found` without the scale factors of linears whose factors are in `added`."""
    spelled = {name.rpartition(".")[0] for name in added if name.endswith(FACTORS)}
    return {name: v for name, v in found.items() if not (name.endswith(FACTORS) and name.rpartition(".")[0] in spelled)}


def _take_apart(tensors: dict[str, Tensor], added: Mapping[str, Tensor]) -> None:
    """proj_out's two halves may each have a bias, of which nunchaku_lite stores the sum."""
    for name, bias in added.items():
        whole = name.removesuffix(".attn.bias") + ".mlp.bias"
        if name.endswith(".proj_out.attn.bias") and whole in tensors:
            tensors[whole] = (tensors[whole].double() - bias.to(tensors[whole].device).double()).float()


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
        check_dtype(files, name, stored.dtypes)


def check_dtype(files: TensorFiles, name: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise CheckpointError unless a stored tensor has one of `dtypes`; only the header is looked at."""
    if header_dtype(files, name) not in dtypes:
        allowed = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
        raise CheckpointError(f"{files.path}: {name} is {files.dtype(name)}, expected {allowed}")


def check_values(path: Path, name: str, tensor: Tensor) -> None:
    """Raise CheckpointError when a tensor holds NaN or infinity, or a smooth factor zero."""
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(f"{path}: {name} holds NaN or infinity; the file is damaged: fetch or make it again")
    if name.endswith((".smooth", ".smooth_factor")) and not bool(tensor.all()):
        raise CheckpointError(f"{path}: {name} holds a zero, by which inputs would be divided")


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
