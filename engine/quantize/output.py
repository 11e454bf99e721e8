"""Put finished blocks into the layout that was asked for, and refuse early what that layout cannot hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from engine.checkpoint import nunchaku
from engine.checkpoint.files import TensorFiles, replacing, write_shards
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import TARGETS, Target, convert
from engine.checkpoint.writer import FileWriter
from engine.errors import ArgumentError, CheckpointError
from engine.models.catalogue import ModelSpec
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.records import FILE_NAME, LayerRecord, records_path, write_records
from engine.quantize.streamed import StreamedModel

__all__ = ["check_layout", "check_place", "check_text_layout", "write_output"]

_SUFFIX = ".safetensors"
# What folders of ours hold; a folder with anything else in it is somebody else's.
_OURS = (_SUFFIX, ".json")


def check_place(out: Path, spec: ModelSpec) -> None:
    """Raise ArgumentError when `out` names something that must not be replaced."""
    if out.name in ("", ".."):
        raise ArgumentError(f"out: expected a name to write to, got {out}")
    source = Path(spec.source).resolve() if spec.local else None
    if source and (source.is_relative_to(out.resolve()) or out.resolve().is_relative_to(source)):
        raise ArgumentError(f"out: {out} is the folder of {spec.name} itself, or a part of it; choose another name")
    if out.suffix == _SUFFIX and out.is_dir():
        raise ArgumentError(f"out: expected a file to write for a name ending in {_SUFFIX}, got the folder {out}")
    if out.suffix != _SUFFIX and out.is_file():
        raise ArgumentError(f"out: expected a folder to write, or a name ending in {_SUFFIX}, got the file {out}")
    others = sorted(entry.name for entry in out.iterdir() if entry.suffix not in _OURS) if out.is_dir() else []
    if others:
        raise ArgumentError(f"out: {out} holds other things than a checkpoint ({others[0]}); choose another name")


def check_layout(
    layout: Target, out: Path, details: Quantization, streamed: StreamedModel, groups: Sequence[LinearGroup]
) -> None:
    """Raise ArgumentError when `layout` cannot hold `groups` of the model quantized by `details`."""
    if layout not in TARGETS:
        raise ArgumentError(f"format: expected one of {', '.join(TARGETS)}, got {layout!r}")
    if layout == "nunchaku":
        _check_nunchaku(details)
    if layout == "nunchaku_lite":
        _check_lite(out, details, streamed, groups)


def check_text_layout(layout: Target, out: Path, keep: Sequence[str]) -> None:
    """Raise ArgumentError when a text encoder in `layout` cannot be written to `out`."""
    if layout not in ("canonical", "nunchaku"):
        raise ArgumentError(f"format: a text encoder is written as canonical or nunchaku, got {layout!r}")
    if layout == "nunchaku" and out.suffix != _SUFFIX:
        raise ArgumentError(f"out: nunchaku's text encoder is one file, expected a name in {_SUFFIX}, got {out.name}")
    if layout == "nunchaku" and keep:
        raise ArgumentError(f"keep: nunchaku's layout has no place for linears in 16 bits, got {', '.join(keep)}")


def _check_nunchaku(details: Quantization) -> None:
    if details.keep:
        raise ArgumentError(
            f"keep: nunchaku's layout has no place for linears in 16 bits, got {', '.join(details.keep)}; use"
            " nunchaku_lite or canonical"
        )
    if not details.gelu_shift:
        raise ArgumentError("shift: nunchaku always shifts GELU outputs; leave out --no-shift, or use canonical")
    try:
        nunchaku.pieces_for(details.model_class, details.config, details.weight, details.rank, [])
    except (CheckpointError, ValueError, KeyError) as error:
        raise ArgumentError(f"format: nunchaku's cannot hold this model ({error}); use canonical") from error


def _check_lite(out: Path, details: Quantization, streamed: StreamedModel, groups: Sequence[LinearGroup]) -> None:
    if out.suffix == _SUFFIX:
        raise ArgumentError(f"out: nunchaku_lite is a folder, got the file name {out.name}")
    if details.weight != "int4":
        raise ArgumentError(f"format: nunchaku_lite is written for int4 only, got {details.weight}; use nunchaku")
    for name in (name for group in groups for name in group.names):
        linear = get_linear(streamed.model, name)
        if linear.out_features % 128 or linear.in_features % 128:
            raise ArgumentError(
                f"format: nunchaku_lite holds linears in multiples of 128 only, but {name} has {linear.in_features}"
                f" inputs and {linear.out_features} outputs; use nunchaku or canonical"
            )


def write_output(
    blocks: Path,
    out: Path,
    layout: Target,
    scratch: Path,
    *,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    figures: Sequence[LayerRecord] | None,
    tell: Callable[[int, int], None],
) -> None:
    """Write the canonical checkpoint in `blocks` to `out`: in `scratch` first, from where it is moved when whole.

    `figures` go beside it as layers.json; None takes away those of an earlier checkpoint.
    """
    whole = scratch / out.name
    if layout != "canonical":
        convert(blocks, whole, layout, progress=tell)
    else:
        _write_canonical(blocks, whole, metadata, max_shard_bytes)
        tell(1, 1)
    if whole.is_dir():
        if figures is not None:
            write_records(whole / FILE_NAME, figures)
        with replacing(out) as folder:
            for file in sorted(whole.iterdir()):
                os.replace(file, folder / file.name)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    os.replace(whole, out)
    if figures is not None:
        write_records(records_path(out), figures)
    else:
        records_path(out).unlink(missing_ok=True)


def _write_canonical(blocks: Path, whole: Path, metadata: Mapping[str, str], max_shard_bytes: int) -> None:
    with TensorFiles(blocks) as files:
        if whole.suffix != _SUFFIX:
            write_shards(whole, _Lazy(files), metadata, max_shard_bytes)
            return
        with FileWriter(whole, len(files), metadata=metadata) as writer:
            for name in sorted(files):
                writer.add(name, files[name])


class _Lazy(Mapping[str, Tensor]):
    """Tensors of files as a mapping that reads them one at a time."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
