"""Tell the checkpoint layouts apart by what is in them, and open any of them as canonical tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.checkpoint import nunchaku, nunchaku_lite, t5
from engine.checkpoint.canonical import CanonicalSource
from engine.checkpoint.files import TensorFiles
from engine.checkpoint.quantization import FORMAT, check_sizes, read_quantization
from engine.checkpoint.source import Source
from engine.errors import CheckpointError

__all__ = ["Layout", "detect", "open_checkpoint"]

Kind = Literal["canonical", "nunchaku", "nunchaku_folder", "nunchaku_lite", "t5_awq"]
# A stored name that only this model has in nunchaku's layout.
_MARKS = {
    ".attn.qkv_proj.qweight": "SanaTransformer2DModel",
    ".qkv_proj.qweight": "FluxTransformer2DModel",
}


@dataclass(frozen=True)
class Layout:
    """What a path holds: the layout, and the diffusers or transformers class of the model."""

    kind: Kind
    model_class: str


def detect(path: str | Path) -> Layout:
    """Which layout and model `path` holds, by its tensors and metadata rather than its name.

    Raises CheckpointError when it is none that is known, or no whole safetensors file.
    """
    with _files(path) as files:
        return _detect(files)


def open_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Source:
    """Open a 4-bit checkpoint of any known layout; tensors come under their canonical names, on `device`.

    Close it when done. Raises CheckpointError as `detect` does, and when names, shapes or dtypes are wrong.
    """
    files = _files(path, device)
    try:
        source = _as_canonical(files, _detect(files))
        check_sizes(files.path, read_quantization(source).config, len(files))
        return source
    except BaseException:
        files.close()
        raise


def _files(path: str | Path, device: str | torch.device = "cpu") -> TensorFiles:
    """The files of a checkpoint: of a legacy folder the pair, whatever else lies there."""
    path = Path(path)
    pair = [path / name for name in (nunchaku.LEGACY_BLOCKS, nunchaku.LEGACY_REST)]
    missing = [file.name for file in pair if not file.is_file()]
    if len(missing) == 1:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing, the other half of a two-file checkpoint; fetch it again"
        )
    return TensorFiles(path, device, None if missing else pair)


def _as_canonical(files: TensorFiles, layout: Layout) -> Source:
    if layout.kind == "canonical":
        return CanonicalSource(files)
    if layout.kind == "nunchaku_lite":
        return nunchaku_lite.open_source(files)
    if layout.kind == "t5_awq":
        return t5.open_source(files)
    return nunchaku.open_source(files, layout.model_class)


def _detect(files: TensorFiles) -> Layout:
    if files.metadata.get("format") == FORMAT:
        return Layout("canonical", read_quantization(files).model_class)
    config = nunchaku_lite.read_config(files.path)
    if config is not None:
        return Layout("nunchaku_lite", str(config.get("_class_name", "")))
    names = list(files)
    for mark, model_class in _MARKS.items():
        if any(name.endswith(mark) for name in names):
            _refuse_half(files)
            return Layout("nunchaku_folder" if files.path.is_dir() else "nunchaku", model_class)
    if any(name.startswith("encoder.block.") and name.endswith(".qweight") for name in names):
        return Layout("t5_awq", "T5EncoderModel")
    raise CheckpointError(f"{files.path}: {_other(files, names)}")


def _refuse_half(files: TensorFiles) -> None:
    """One file of the legacy pair was given instead of their folder."""
    if files.path.is_file() and "config" not in files.metadata and files.path.name == nunchaku.LEGACY_BLOCKS:
        raise CheckpointError(f"{files.path}: half of a two-file checkpoint; give the folder that holds both files")


def _other(files: TensorFiles, names: list[str]) -> str:
    """Say what the file is instead."""
    if files.path.name == nunchaku.LEGACY_REST:
        return "half of a two-file checkpoint; give the folder that holds both files"
    named = files.metadata.get("model_class")
    if named and any(name.endswith(".qweight") for name in names):
        return f"a 4-bit checkpoint of {json.dumps(named)}, which is not among the models read here (FLUX.1, SANA, T5)"
    if any(".lora_A." in name or ".lora_down.weight" in name for name in names):
        return "a LoRA, not a checkpoint; open it with engine.lora"
    return (
        f"expected a 4-bit checkpoint (metadata format={FORMAT!r}, nunchaku's, nunchaku_lite's or T5's tensors);"
        " 16-bit weights are loaded with --precision bf16"
    )
