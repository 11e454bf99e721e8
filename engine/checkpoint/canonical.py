"""A checkpoint in our own layout, checked as published ones are: types when it is opened, values as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

import torch
from torch import Tensor

from engine.checkpoint.files import TensorFiles
from engine.checkpoint.pieces import FLOAT16, FLOATS, FP8
from engine.checkpoint.quantization import RECORDS, Quantization, read_quantization
from engine.checkpoint.source import check_dtype, check_values
from engine.errors import CheckpointError

__all__ = ["CanonicalSource"]

_GROUPS = {"int4": 64, "nvfp4": 16, "awq-int4": 128}
_LINEAR = {
    "codes": (torch.uint8,),
    "scales": FLOAT16,
    "zeros": FLOAT16,
    "smooth": FLOAT16,
    "smooth_orig": FLOAT16,
    "lora_down": FLOAT16,
    "lora_up": FLOAT16,
}


class CanonicalSource:
    """The tensors of canonical `files` by name, read when asked for.

    Raises CheckpointError when the metadata names a quantization that there is none of, or a tensor has a type that
    its name does not allow; on reading, when a tensor holds NaN, infinity, or a smooth factor of zero.
    """

    def __init__(self, files: TensorFiles) -> None:
        self.files, self.path, self.metadata = files, files.path, files.metadata
        details = read_quantization(files)
        if _GROUPS.get(details.weight) != details.group_size:
            raise CheckpointError(
                f"{self.path}: expected one of {_GROUPS} as weight dtype and group_size, got {details.weight!r} and"
                f" {details.group_size}"
            )
        for name in files:
            if not name.startswith(RECORDS):
                check_dtype(files, name, self._allowed(name, details))

    def _allowed(self, name: str, details: Quantization) -> tuple[torch.dtype, ...]:
        module, _, part = name.rpartition(".")
        if f"{module}.codes" not in self.files:
            return FLOATS
        if part == "wscales":
            return FP8 if details.weight == "nvfp4" else FLOAT16
        return _LINEAR.get(part, FLOATS)

    def __enter__(self) -> CanonicalSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[name]
        if not name.startswith(RECORDS):
            check_values(self.path, name, tensor)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read."""
        return self.files.shape(name)

    def close(self) -> None:
        """Let go of the mapped files."""
        self.files.close()
