"""Which model to open: a name, or `auto` with the reason for its choice. Never touches the network."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.models import catalogue
from engine.models.catalogue import ModelSpec

__all__ = ["Choice", "beside", "choose", "downloaded", "has_column", "parted"]

ACTIVATIONS = ("w4a8", "w4a4")


@dataclass(frozen=True)
class Choice:
    """The model to open and why, in one sentence."""

    spec: ModelSpec
    reason: str


def choose(model: str, models: Sequence[str], has_cuda: Callable[[], bool]) -> Choice:
    """Resolve `model`; "auto" takes the first large one of `models` that is ready here, else the small one.

    `models` begins with the small one. `has_cuda` is asked only when the answer matters, for it imports torch.
    Raises ModelError when the name means nothing.
    """
    if model != "auto":
        return Choice(catalogue.resolve(model), "You asked for it with --model.")
    small, others = catalogue.resolve(models[0]), [catalogue.resolve(name) for name in models[1:]]
    ready = [spec for spec in others if not spec.ships and downloaded(spec)]
    if not ready:
        return Choice(
            small, "The large models are not on this machine, so the small one that ships with the suite runs."
        )
    if not has_cuda():
        return Choice(small, f"{ready[0].title} is on this machine, but no CUDA device is, so the small model runs.")
    return Choice(ready[0], "A CUDA device and these weights are on this machine.")


def beside(choice: Choice, models: Sequence[str]) -> list[Choice]:
    """The others of `models` that a page can switch to: as large as the chosen one, and on this machine."""
    rows = [catalogue.resolve(name) for name in models]
    if choice.spec not in rows:
        return []
    return [
        Choice(spec, "The page switched to it.")
        for spec in rows
        if spec != choice.spec and spec.ships == choice.spec.ships and downloaded(spec)
    ]


def parted(column: str) -> tuple[str, str | None]:
    """The precision of a column, and what its 4-bit layers are given: "int4-w4a4" is INT4 with 4-bit numbers.

    None where the name does not say.
    """
    precision, _, activation = column.partition("-")
    return precision, activation or None


def has_column(spec: ModelSpec, column: str) -> bool:
    """Whether the model can be a column of that name."""
    precision, activation = parted(column)
    four_bit = precision in spec.checkpoints
    return column in spec.precisions or (four_bit and activation in ACTIVATIONS)


def downloaded(spec: ModelSpec) -> bool:
    """Whether every file that running `spec` takes is in the hub's local cache or in a folder."""
    if spec.local:
        return True
    index = _cached(spec.source, "model_index.json")
    checkpoints = [spec.checkpoints[name] for name in spec.usual if name in spec.checkpoints]
    return index is not None and _whole(index) and all(map(_checkpoint_here, checkpoints))


def _whole(index: Path) -> bool:
    """Whether each component with weights that the index names has all its shards beside it."""
    components = [name for name, kind in json.loads(index.read_text()).items() if isinstance(kind, list) and kind[0]]
    return all(_component_here(index.parent / name) for name in components)


def _component_here(folder: Path) -> bool:
    shards = [
        shard
        for listing in folder.glob("*.safetensors.index.json")
        for shard in set(json.loads(listing.read_text())["weight_map"].values())
    ]
    if shards:
        return all((folder / shard).is_file() for shard in shards)
    # Tokenizers and schedulers are configuration files alone; models also have a config.json, and weights with it.
    needs_weights = (folder / "config.json").is_file()
    return folder.is_dir() and (not needs_weights or any(folder.glob("*.safetensors")))


def _checkpoint_here(where: str) -> bool:
    if Path(where).exists():
        return True
    parts = where.split("/", 2)
    return len(parts) == 3 and _cached(f"{parts[0]}/{parts[1]}", parts[2]) is not None


def _cached(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None
