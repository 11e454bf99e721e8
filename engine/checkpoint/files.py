"""Safetensors files and folders of shards, read lazily and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError

__all__ = ["INDEX_NAME", "TensorFiles", "all_finite", "check_keys", "replacing", "write_shards"]

INDEX_NAME = "model.safetensors.index.json"
_MAX_NAMED = 5
_CHUNK = 2**21


class TensorFiles:
    """The tensors of one `.safetensors` file, or of a folder of them (or those `only`), read one at a time.

    Raises CheckpointError when `path` is missing, is not safetensors, is truncated or lacks a listed shard.
    """

    def __init__(
        self, path: str | Path, device: str | torch.device = "cpu", only: Sequence[Path] | None = None
    ) -> None:
        self.path = Path(path)
        self._device = str(device)
        self._handles = [(file, _open(file, self._device)) for file in only or _files(self.path)]
        self._where: dict[str, Any] = {}
        for file, handle in self._handles:
            names = handle.keys()
            if twice := next((name for name in names if name in self._where), None):
                raise CheckpointError(
                    f"{self.path}: {twice} is in {file.name} and in another file; give one file of this folder instead"
                )
            self._where.update(dict.fromkeys(names, handle))
        self.metadata: dict[str, str] = {}
        for _, handle in self._handles:
            self.metadata.update(handle.metadata() or {})
        _check_index(self.path, self._where)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files."""
        self._where.clear()
        self._handles.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def keys(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, read from the header alone."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as the header spells it, for example "BF16"."""
        return str(self._where[name].get_slice(name).get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._where[name].get_tensor(name)


def check_keys(path: str | Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raise CheckpointError, naming the first missing and unexpected keys, unless both sets are equal."""
    found, expected = set(found), set(expected)
    missing, unexpected = sorted(expected - found), sorted(found - expected)
    if not missing and not unexpected:
        return
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
            parts.append(f"{len(names)} {label} ({', '.join(names[:_MAX_NAMED])}{more})")
    raise CheckpointError(
        f"{path}: its tensors are not those of this model: {'; '.join(parts)}. Use the checkpoint made for this model."
    )


def all_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; looks at a few MB at a time."""
    return all(_is_finite(part) for part in tensor.reshape(-1).split(_CHUNK))


def _is_finite(part: Tensor) -> bool:
    part = part.float() if part.element_size() == 1 else part
    # One NaN or infinity spoils a sum, which is faster than a look at each value; a sum may also overflow by itself.
    return bool(part.sum(dtype=torch.float32).isfinite()) or bool(part.isfinite().all())


def write_shards(
    folder: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int
) -> None:
    """Write `tensors` into `folder` as shards of at most `max_bytes` each plus an index.

    A new folder is filled beside the old one and takes its place at the end, so a reader never sees half of it. The
    same tensors and metadata give the same bytes (safetensors' own writer puts metadata in any order).
    """
    from engine.checkpoint.writer import FileWriter  # which takes names from this module

    folder = Path(folder)
    shards = _split(tensors, max_bytes)
    with replacing(folder) as partial:
        where: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            with FileWriter(partial / file, len(shard), metadata=metadata) as writer:
                for name in shard:
                    writer.add(name, tensors[name])
            where.update(dict.fromkeys(shard, file))
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total, **metadata}, "weight_map": dict(sorted(where.items()))}
        (partial / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `folder` when the block ends well, and vanishes otherwise."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        partial.chmod(0o755)
        yield partial
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
            os.rename(folder, old / folder.name)
            os.rename(partial, folder)
            shutil.rmtree(old)
        else:
            os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{path}: expected a folder with .safetensors files, found none")
        return files
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such file or folder; check the path, or make it with python -m engine.quantize"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: expected a .safetensors file (no other kind is ever loaded), got {path.suffix!r}"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file")
    return [path]


def _open(file: Path, device: str):
    try:
        return safe_open(file, framework="pt", device=device).__enter__()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); it may be truncated or renamed: fetch or make it again"
        ) from error


def _check_index(path: Path, where: Mapping[str, object]) -> None:
    index = path / INDEX_NAME
    if not path.is_dir() or not index.is_file():
        return
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        lost = sorted({str(file) for name, file in listed.items() if name not in where})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: {INDEX_NAME} is damaged ({error!r}); fetch it again") from error
    if lost:
        raise CheckpointError(
            f"{path}: {lost[0]} is listed in {INDEX_NAME} but its tensors are not there; fetch it again"
        )
