"""Paint a prompt set in one precision: shared among processes by index, and gone on with after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.evaluation.sets import Item
from engine import ArgumentError, Request, read_metadata
from engine.models.catalogue import ModelSpec

__all__ = ["Shard", "paint", "picture_path"]

_COMPARED = ("prompt", "seed", "steps", "guidance", "width", "height")


@dataclass(frozen=True)
class Shard:
    """This process's part of the work: items index, index + count, ..."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_process(cls) -> Shard:
        """What torchrun or accelerate tell this process; one shard of one where neither started it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "2/8", the third of eight; raises ArgumentError."""
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ArgumentError(f"--shard: expected INDEX/COUNT with INDEX from 0, got {text!r}")
        return cls(int(index), int(count))

    def device(self, device: str) -> str:
        """The GPU of this process where several share a machine."""
        if self.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.index)) % torch.cuda.device_count()}"
        return device

    def wait_for_all(self) -> None:
        """Return when every process started together has come here; nothing to wait for in a process of its own."""
        if self.count == 1 or "MASTER_ADDR" not in os.environ:
            return
        from datetime import timedelta

        from torch import distributed

        distributed.init_process_group("gloo", timeout=timedelta(days=2))
        distributed.barrier()
        distributed.destroy_process_group()


def picture_path(folder: Path, item: Item) -> Path:
    """Where the picture of an item lies."""
    return folder / f"{item.name}.png"


def paint(
    load: Callable[[], Any],
    spec: ModelSpec,
    items: Sequence[Item],
    folder: Path,
    asked: Mapping[str, Any],
    on_picture: Callable[[], object],
) -> int:
    """Paint the items that `folder` does not hold yet and return how many there were.

    `asked` holds fields of the Requests. The model is loaded when the first picture is due. Files appear whole, so
    what is there after a kill is kept. Raises ArgumentError when a picture that is there was made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine: Any = None
    painted = 0
    for item in items:
        path, request = picture_path(folder, item), Request(item.prompt, item.seed, **asked).resolved(spec)
        if path.exists():
            _check_settings(path, request)
        else:
            engine = engine or load()
            engine.run(request).save(path)
            painted += 1
        on_picture()
    return painted


def _check_settings(path: Path, request: Request) -> None:
    found = read_metadata(path) or {}
    for field in _COMPARED:
        if found.get(field) != getattr(request, field):
            raise ArgumentError(
                f"--out: {path} was made with {field}={found.get(field)!r}, now it is {getattr(request, field)!r}:"
                " use another folder, or the settings it was begun with"
            )
