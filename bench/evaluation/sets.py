"""Prompt sets: what to paint, with which seed, and the reference pictures where a set has them.

    zoo           held-out captions of the small models' scenes
    FILE          .txt (a prompt a line), .json or .yaml (a list of prompts, or name -> prompt)
    mjhq:DIR      MJHQ-30K: meta_data.json beside mjhq30k_imgs.zip
    sdci:DIR      sDCI: sDCI.yaml beside sDCI.gz

Data sets are read from local files alone; nothing is fetched and no loading script runs.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evaluation.pictures import Archive
from engine.errors import ArgumentError

__all__ = ["Item", "PromptSet", "read_set", "seed_of"]

ZOO_SEED, ZOO_FIRST_NOISE = 2026, 1000  # those of zoo/evaluate.py, so that its figures can be compared
_NAME = re.compile(r"[\w][\w.-]*")


@dataclass(frozen=True)
class Item:
    """One picture to paint: `name` is that of its file, without the suffix."""

    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class PromptSet:
    """The items of a set in the order of their names; `references` holds real pictures under the same names.

    `captions` and `scenes` are what the zoo's probe and renderer need; other sets have none.
    """

    name: str
    items: Sequence[Item]
    references: Archive | None = None
    captions: Sequence[Any] = ()
    scenes: Any = None


def read_set(text: str, count: int | None) -> PromptSet:
    """Read a set as the module's table names it, or a fixed random part of it of `count` items.

    Raises ArgumentError when a file is missing or holds something else.
    """
    kind, _, place = text.rpartition(":")
    if text == "zoo":
        return _zoo(count or 256)
    if kind == "mjhq":
        return _mjhq(Path(place), count)
    if kind == "sdci":
        return _sdci(Path(place), count)
    path = Path(text)
    if not path.is_file():
        raise ArgumentError(f"prompts: expected zoo, a file, mjhq:DIR or sdci:DIR, got {text!r}")
    return PromptSet(path.stem, _items(_prompts_of(path), count))


def seed_of(name: str) -> int:
    """The seed of a picture by its name: a polynomial hash (base 31), the same in every precision and program."""
    value = 0
    for letter in name:
        value = (value * 31 + ord(letter)) % (10**9 + 7)
    return value


def _zoo(count: int) -> PromptSet:
    from zoo import scenes

    batch = scenes.sample(count, ZOO_SEED, "test")
    captions = scenes.describe(batch, ZOO_SEED)
    items = [Item(f"{i:05d}", caption.text, ZOO_FIRST_NOISE + i) for i, caption in enumerate(captions)]
    return PromptSet("zoo", items, captions=captions, scenes=batch)


def _mjhq(folder: Path, count: int | None) -> PromptSet:
    table = _mapping(folder / "meta_data.json")
    return PromptSet("mjhq", _items(_texts(table, folder), count), Archive.near(folder, ("mjhq30k_imgs.zip",)))


def _sdci(folder: Path, count: int | None) -> PromptSet:
    table = _mapping(folder / "sDCI.yaml")
    names = ("sDCI.gz", "sDCI.tar.gz", "sDCI.zip")
    return PromptSet("sdci", _items(_texts(table, folder), count), Archive.near(folder, names))


def _items(prompts: Mapping[str, str], count: int | None) -> list[Item]:
    """All prompts, or the part that the published evaluations take: names shuffled with seed 0, the first ones."""
    names = sorted(prompts)
    if count is not None and count < len(names):
        random.Random(0).shuffle(names)
        names = sorted(names[:count])
    for name in names:
        if not _NAME.fullmatch(name):
            raise ArgumentError(f"prompts: expected names of letters, digits, '.', '_' and '-', got {name!r}")
    return [Item(name, prompts[name], seed_of(name)) for name in names]


def _prompts_of(path: Path) -> dict[str, str]:
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return _texts({f"{i:05d}": line for i, line in enumerate(filter(None, lines))}, path)
    data = _load(path)
    if isinstance(data, list):
        data = {f"{i:05d}": value for i, value in enumerate(data)}
    return _texts(_checked(data, path), path)


def _texts(table: Mapping[str, Any], path: Path) -> dict[str, str]:
    """name -> prompt, where an entry is the prompt itself, or holds it as prompt, caption or the first of captions."""
    found = {}
    for name, entry in table.items():
        if isinstance(entry, dict):
            entry = entry.get("prompt") or entry.get("caption") or (entry.get("captions") or [None])[0]
        if not isinstance(entry, str) or not entry.strip():
            raise ArgumentError(f"prompts: {path}: expected a prompt for {name!r}, got {entry!r}")
        found[str(name)] = entry.strip()
    if not found:
        raise ArgumentError(f"prompts: {path} holds no prompt")
    return found


def _mapping(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ArgumentError(f"prompts: {path} is missing: put the files of the data set into {path.parent}")
    return _checked(_load(path), path)


def _checked(data: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ArgumentError(f"prompts: {path}: expected names with prompts, got {type(data).__name__}")
    return data


def _load(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except Exception as error:  # each parser has its own
        raise ArgumentError(f"prompts: {path} cannot be read: {error}") from error
    raise ArgumentError(f"prompts: expected a .txt, .json or .yaml file, got {path}")
