"""The folder beside an output in which a run keeps what it has finished, so that a killed run can go on from there.

    my-int4.work/
      request.json    what was asked for: records of another request are never mixed in
      inputs/         what the linears of each block read; there when calibration is over, a file less with each block
      blocks/         finished blocks, a canonical checkpoint in the end
      result/         the output while it is written

Every file appears under its name when it is whole, so whatever is there can be used.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from engine.checkpoint.files import TensorFiles
from engine.checkpoint.writer import FileWriter
from engine.errors import ArgumentError, CheckpointError
from engine.models.plan import LinearGroup
from engine.quantize.inputs import Inputs
from engine.quantize.records import LayerRecord, read_records, write_records

__all__ = ["Work"]

_REST = "rest"  # the record of all that is outside the blocks


class Work:
    """The work folder of `out`, held by this process as long as the context lasts.

    `request` is all that decides on the bytes of a block, in words. Raises ArgumentError when the folder holds
    finished work and `resume` was not asked for, when that work belongs to another request, or another run is at it.
    """

    def __init__(self, out: Path, request: Mapping[str, str], resume: bool) -> None:
        self.folder = out.with_name(f"{out.name}.work")
        self.blocks, self._inputs = self.folder / "blocks", self.folder / "inputs"
        self._request, self._resume = dict(request), resume
        self._lock = -1

    def __enter__(self) -> Work:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_CREAT | os.O_RDWR)
        try:
            self._take()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not self._has_work():
            self._remove()
        os.close(self._lock)

    def has_inputs(self, blocks: Sequence[str]) -> bool:
        """Whether what the linears of all these blocks read is kept."""
        return all((self._inputs / f"{block}.safetensors").is_file() for block in blocks)

    def keep_inputs(self, found: Iterable[tuple[str, Mapping[LinearGroup, Inputs]]]) -> None:
        """Keep what the linears of each block read; all blocks, or nothing."""
        partial = Path(tempfile.mkdtemp(dir=self.folder, prefix="inputs-"))
        for block, groups in found:
            with FileWriter(partial / f"{block}.safetensors", 2 * len(groups)) as out:
                for number, seen in enumerate(groups.values()):
                    assert seen.rows is not None
                    out.add(f"{number}.rows", seen.rows)
                    out.add(f"{number}.largest", seen.largest)
        shutil.rmtree(self._inputs, ignore_errors=True)
        os.rename(partial, self._inputs)

    def inputs(self, block: str, groups: Sequence[LinearGroup], device: torch.device) -> dict[LinearGroup, Inputs]:
        """What the linears of a block read, in float32 on `device`."""
        with TensorFiles(self._inputs / f"{block}.safetensors") as files:
            parts = [(files[f"{n}.rows"], files[f"{n}.largest"]) for n in range(len(groups))]
            # Copies: a tensor from a file is the file's own memory.
            moved = [[part.to(device, torch.float32, copy=True) for part in pair] for pair in parts]
        return {group: Inputs(*pair) for group, pair in zip(groups, moved, strict=True)}

    def has(self, block: str) -> bool:
        """Whether the record of a block is there and whole; one that is not is made again."""
        try:
            TensorFiles(self._record(block)).close()
            read_records(self._figures(block))
        except CheckpointError:
            return False
        return True

    def keep(
        self, block: str, tensors: Mapping[str, Tensor], figures: Sequence[LayerRecord], metadata: Mapping[str, str]
    ) -> None:
        """Keep a finished block; what its linears read is no longer needed."""
        self.blocks.mkdir(exist_ok=True)
        write_records(self._figures(block), figures)
        with FileWriter(self._record(block), len(tensors), metadata=metadata) as out:
            for name in sorted(tensors):
                out.add(name, tensors[name])
        (self._inputs / f"{block}.safetensors").unlink(missing_ok=True)

    def keep_rest(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep all that is outside the blocks."""
        self.keep(_REST, tensors, [], metadata)

    def figures(self, blocks: Sequence[str]) -> list[LayerRecord]:
        """The figures of finished blocks, in order."""
        return [record for block in blocks for record in read_records(self._figures(block))]

    def scratch(self) -> Path:
        """An empty folder for the output; what a killed run left there is gone."""
        folder = self.folder / "result"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _record(self, block: str) -> Path:
        return self.blocks / f"{block}.safetensors"

    def _figures(self, block: str) -> Path:
        return self.blocks / f"{block}.json"

    def _has_work(self) -> bool:
        return self._inputs.is_dir() or any(self.blocks.glob("*.safetensors"))

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArgumentError(f"out: another run is at work in {self.folder}; wait for it, or choose another name") \
                from error  # fmt: skip
        file = self.folder / "request.json"
        if self._has_work():
            if not self._resume:
                raise ArgumentError(
                    f"out: {self.folder} holds the finished blocks of a run that was ended; go on from them with"
                    " --resume, or delete the folder"
                )
            self._compare(file)
        partial = file.with_name("request.json.partial")
        partial.write_text(json.dumps(self._request, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    def _compare(self, file: Path) -> None:
        try:
            kept = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            kept = {}
        for name in sorted({*self._request, *kept}):
            before, now = kept.get(name), self._request.get(name)
            if before != now:
                raise ArgumentError(
                    f"resume: {self.folder} belongs to another request ({name}: {before} then, {now} now); ask for the"
                    " same again, choose another --out, or delete the folder"
                )

    def _remove(self) -> None:
        """Take the folder away at once: half of one must not be mistaken for a run to go on with."""
        gone = Path(tempfile.mkdtemp(dir=self.folder.parent, prefix=f".{self.folder.name}-"))
        os.rename(self.folder, gone / "work")
        shutil.rmtree(gone)
