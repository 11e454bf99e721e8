"""Write safetensors files one tensor at a time, so that a checkpoint never has to fit into memory.

Room for the header is left at the start and filled in at the end. A file appears under its name when it is whole.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.files import INDEX_NAME
from engine.errors import CheckpointError
from engine.placing import place

__all__ = ["FileWriter", "FolderWriter"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 16
_ROOM_PER_TENSOR = 256


class FileWriter:
    """A `.safetensors` file being written; `count` and `extra` bound the header's size.

    Leaving the `with` block normally puts the file in place, leaving it by an exception removes what was written.
    """

    def __init__(self, path: str | Path, count: int, extra: int = 0, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = dict(metadata or {})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        self._partial = Path(partial)
        self._file = os.fdopen(handle, "wb")
        size = count * _ROOM_PER_TENSOR + extra + sum(len(key) + 2 * len(text) for key, text in self.metadata.items())
        self._room = -(-(size + 4096) // _ALIGNMENT) * _ALIGNMENT
        self._file.seek(8 + self._room)
        self._end = 0
        self._entries: dict[str, dict[str, Any]] = {}
        self._odd: dict[str, Tensor] = {}

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        else:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data so far."""
        return self._end

    @property
    def names(self) -> list[str]:
        """Tensors so far."""
        return list(dict.fromkeys((*self._entries, *self._odd)))

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor; raises CheckpointError when the name was used before."""
        if name in self._entries or name in self._odd:
            raise CheckpointError(f"{self.path}: tensor {name!r} was written twice")
        if tensor.nbytes % _ALIGNMENT:
            # The format allows no gaps, so tensors that would misalign the next one come last.
            self._odd[name] = tensor.clone()
            return
        self._append(name, tensor)

    def _append(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        start = self._end
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._end += data.nbytes
        self._entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, self._end],
        }

    def _finish(self) -> None:
        for name, tensor in sorted(self._odd.items(), key=lambda item: (-item[1].element_size(), item[0])):
            self._append(name, tensor)
        entries: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        header = json.dumps(entries | dict(sorted(self._entries.items())), separators=(",", ":")).encode()
        with self._file:
            if len(header) > self._room:
                raise CheckpointError(f"{self.path}: the header needs {len(header)} bytes, {self._room} were set aside")
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        place(self._partial, self.path)


class FolderWriter:
    """Shards of at most `max_bytes` (one tensor may exceed it) in an existing folder, with an index."""

    def __init__(self, folder: Path, count: int, metadata: Mapping[str, str], max_bytes: int) -> None:
        self.metadata = dict(metadata)
        self._folder, self._count, self._max = folder, count, max_bytes
        self._shards: list[FileWriter] = []

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shards:
            self._shards[-1].__exit__(kind, value, trace)
        if kind is None:
            self._finish()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor, opening the next shard when it does not fit."""
        if not self._shards or (self._shards[-1].nbytes and self._shards[-1].nbytes + tensor.nbytes > self._max):
            if self._shards:
                self._shards[-1].__exit__(None, None, None)
            number = len(self._shards) + 1
            self._shards.append(FileWriter(self._folder / f"{number}.safetensors", self._count, 0, self.metadata))
        self._shards[-1].add(name, tensor)

    def _finish(self) -> None:
        where: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(self._shards, start=1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            os.replace(shard.path, self._folder / name)
            where.update(dict.fromkeys(shard.names, name))
            total += shard.nbytes
        index = {"metadata": {"total_size": total, **self.metadata}, "weight_map": dict(sorted(where.items()))}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
