"""The 16-bit weights of a part of a model, read from its safetensors files when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.files import TensorFiles
from engine.checkpoint.hub import subfolder
from engine.errors import ModelError
from engine.models.catalogue import ModelSpec
from engine.models.loading import DTYPE

__all__ = ["Weights", "part_folder"]

_SAMPLES, _SAMPLE_BYTES = 16, 4096


def part_folder(spec: ModelSpec, part: str) -> Path:
    """Where a part of the 16-bit `spec` ("transformer") lies on this machine; that of a hub model is downloaded once.

    Raises ModelError when it is nowhere.
    """
    return Path(spec.source) / part if spec.local else subfolder(spec.source, part)


class Weights:
    """Tensors of a model's folder by their names; `config` is its config.json, `nbytes` the files' size.

    The files are called `stem`.safetensors, or what `stem`.safetensors.index.json says. They are open only while they
    are read: an open one counts as memory in use, page by page, as it is looked at.
    Raises ModelError or CheckpointError when the folder is not whole.
    """

    def __init__(self, folder: Path, stem: str = "diffusion_pytorch_model") -> None:
        self.folder = folder
        self.config = _read_json(folder / "config.json")
        self._where: dict[str, Path] = {}
        self.nbytes = 0
        for path in _files(folder, f"{stem}.safetensors"):
            with TensorFiles(path) as files:
                self._where |= dict.fromkeys(files, path)
            self.nbytes += path.stat().st_size

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def read(self, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
        """The tensors called `names` on `device`, numbers in BF16. On a CPU they may be the file's own memory."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._where[name], []).append(name)
        found: dict[str, Tensor] = {}
        for path, inside in wanted.items():
            with TensorFiles(path) as files:
                for name in inside:
                    tensor = files[name]
                    found[name] = tensor.to(device, DTYPE if tensor.is_floating_point() else tensor.dtype)
        return found

    def fingerprint(self) -> str:
        """A hash of configuration, names, shapes, types and samples of every tensor: another model has another one."""
        parts: dict[str, str] = {}
        for path in set(self._where.values()):
            with TensorFiles(path) as files:
                parts |= {name: _hash(files[name]) for name in files if self._where[name] == path}
        return sha256(json.dumps([self.config, parts], sort_keys=True).encode()).hexdigest()


def _hash(tensor: Tensor) -> str:
    """Of pieces of a tensor's bytes, evenly spaced: reading 24 GB to tell two models apart would take longer."""
    found = sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(raw), max(_SAMPLE_BYTES, len(raw) // _SAMPLES)):
        found.update(raw[start : start + _SAMPLE_BYTES].numpy().data)
    return found.hexdigest()


def _files(folder: Path, file: str) -> list[Path]:
    index = f"{file}.index.json"
    if (folder / index).is_file():
        names = sorted(set(_read_json(folder / index)["weight_map"].values()))
        return [folder / name for name in names]
    if not (folder / file).is_file():
        raise ModelError(
            f"{folder}: expected {file} or {index} (weights of other kinds are never loaded), found neither"
        )
    return [folder / file]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: expected the JSON file of a model's folder ({error})") from error
