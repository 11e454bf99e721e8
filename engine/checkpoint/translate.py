"""Translate whole checkpoints between layouts, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint import exact, nunchaku, nunchaku_flux, nunchaku_lite, t5
from engine.checkpoint.canonical import CanonicalSource
from engine.checkpoint.exact import Exact
from engine.checkpoint.files import replacing
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.pieces import Piece, same_bits
from engine.checkpoint.quantization import RECORDS, Quantization, read_quantization
from engine.checkpoint.source import FACTORS, PublishedSource, Source
from engine.checkpoint.writer import FileWriter, FolderWriter
from engine.devices import pick_device
from engine.errors import ArgumentError, CheckpointError

__all__ = ["TARGETS", "Target", "convert"]

Target = Literal["canonical", "nunchaku", "nunchaku_lite"]
TARGETS: tuple[Target, ...] = ("canonical", "nunchaku", "nunchaku_lite")
Progress = Callable[[int, int], None]
_SHARD = 4 * 2**30
_SUFFIX = ".safetensors"


@torch.inference_mode()
def convert(
    source: str | Path, target: str | Path, to: Target, *, device: str = "cpu", progress: Progress | None = None
) -> None:
    """Read the 4-bit checkpoint `source`, of any layout, and write it to `target` in the layout `to`.

    A `target` ending in .safetensors becomes one file, any other a folder: of shards for "canonical", the two-file
    pair for "nunchaku"; "nunchaku_lite" is always a folder. Nothing appears at `target` before it is whole.
    `progress` is told (layers done, layers in all). Raises CheckpointError when `source` cannot be read, or holds
    something that `to` cannot; ArgumentError for a target or a device that does not suit.
    """
    target = Path(target)
    if to not in TARGETS:
        raise ArgumentError(f"to: expected {', '.join(TARGETS)}, got {to!r}")
    if to == "nunchaku_lite" and target.suffix == _SUFFIX:
        raise ArgumentError(f"target: nunchaku_lite is a folder, got the file name {target.name}")
    if target.exists() and target.resolve() == Path(source).resolve():
        raise ArgumentError(f"target: {target} is the source itself; choose another name")
    if target.suffix == _SUFFIX and target.is_dir():
        raise ArgumentError(f"target: {target} is a folder; choose another name")
    opened = open_checkpoint(source, pick_device(device))
    try:
        details = read_quantization(opened)
        tell = progress or (lambda *_: None)
        if isinstance(opened, CanonicalSource):
            _refuse_strangers(opened, details)
        if to == "canonical":
            _write_canonical(opened, target, tell)
        elif details.model_class == t5.MODEL_CLASS:
            _write_t5(opened, details, target, to, tell)
        elif to == "nunchaku":
            _write_nunchaku(opened, details, target, tell)
        else:
            _write_lite(opened, details, target, tell)
    finally:
        opened.close()


def _write_canonical(source: Source, target: Path, tell: Progress) -> None:
    count = 2 * len(list(source)) + 64
    if target.suffix == _SUFFIX:
        with FileWriter(target, count, 0, source.metadata) as out:
            for name, tensor in _canonical(source, tell):
                out.add(name, tensor)
        return
    with replacing(target) as folder, FolderWriter(folder, count, source.metadata, _SHARD) as out:
        for name, tensor in _canonical(source, tell):
            out.add(name, tensor)


def _canonical(source: Source, tell: Progress) -> Iterator[tuple[str, Tensor]]:
    """Canonical tensors, and records of stored ones that could not be derived from them again."""
    if not isinstance(source, PublishedSource):
        names = sorted(source)
        for done, name in enumerate(names, start=1):
            yield name, source[name]
            tell(done, len(names))
        return
    for done, piece in enumerate(source.pieces, start=1):
        raw = source.read(piece)
        tensors = source.decode(piece, raw)
        yield from tensors.items()
        written = piece.encode(tensors)
        for name in raw.keys() | written.keys():
            if name not in raw:
                yield RECORDS + name, torch.empty(0, dtype=torch.uint8)  # stands for "was not there"
            elif name not in written or not same_bits(raw[name], written[name]):
                yield RECORDS + name, raw[name]
        tell(done, len(source.pieces))
    yield from source.records.items()


def _write_nunchaku(source: Source, details: Quantization, target: Path, tell: Progress) -> None:
    if details.keep:
        raise CheckpointError(
            f"{source.path}: keeps linears in 16 bits ({', '.join(details.keep[:3])}), which nunchaku's layout cannot"
            " hold; write nunchaku_lite, or quantize without --keep"
        )
    if not details.gelu_shift:
        raise CheckpointError(
            f"{source.path}: made for GELU outputs that keep their sign, which nunchaku shifts; quantize with --shift"
        )
    layers = nunchaku.pieces_for(details.model_class, details.config, details.weight, details.rank, list(source))
    metadata = nunchaku.metadata(details, source.metadata.get("comfy_config"))
    if target.suffix == _SUFFIX:
        _write_file(source, layers, target, nunchaku.LAYOUT, metadata, tell)
        return
    blocks = [piece for piece in layers if all(name.startswith(nunchaku_flux.BLOCKS) for name in piece.stored())]
    rest = [piece for piece in layers if piece not in blocks]
    with replacing(target) as folder:
        _write_file(source, blocks, folder / nunchaku.LEGACY_BLOCKS, nunchaku.LAYOUT, {}, tell)
        _write_file(source, rest, folder / nunchaku.LEGACY_REST, nunchaku.LAYOUT, {}, lambda *_: None)
        (folder / "config.json").write_text(metadata["config"] + "\n", encoding="utf-8")
        (folder / "comfy_config.json").write_text(metadata["comfy_config"] + "\n", encoding="utf-8")


def _write_t5(source: Source, details: Quantization, target: Path, to: Target, tell: Progress) -> None:
    if to != "nunchaku" or target.suffix != _SUFFIX:
        raise ArgumentError(
            f"target: a published T5 encoder is one .safetensors file written --to nunchaku, got {target}"
        )
    _write_file(source, t5.pieces_for(source), target, t5.LAYOUT, t5.metadata(details), tell)


def _write_lite(source: Source, details: Quantization, target: Path, tell: Progress) -> None:
    layers = nunchaku_lite.pieces_for(source, details)
    smooth = next((name for name in source if name.endswith(".smooth")), None)
    dtype = source[smooth].dtype if smooth else torch.bfloat16
    metadata = {"format": "pt"}
    if any(isinstance(piece, nunchaku_lite.ProjOutPiece) and piece.joined for piece in layers):
        metadata[nunchaku_lite.RANK_KEY] = str(details.rank)
    with replacing(target) as folder:
        _write_file(source, layers, folder / nunchaku_lite.FILE, nunchaku_lite.METHOD, metadata, tell)
        config = nunchaku_lite.config_of(details, layers, dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_file(
    source: Source, layers: Sequence[Piece], path: Path, layout: str, metadata: Mapping[str, str], tell: Progress
) -> None:
    names = [name for piece in layers for name in piece.stored()]
    kept = _absent(source) if layout == nunchaku_lite.METHOD else {}
    # Exact vectors travel in the header as base64: at most all 1-D tensors there are, as float32.
    vectors = (source.shape(name)[0] for name in source if name.endswith(_VECTORS) and source.shape(name))
    room = sum(8 * size + 160 for size in vectors) + sum(len(name) + 32 for name in kept)
    with FileWriter(path, len(names), room, metadata) as out:
        for done, piece in enumerate(layers, start=1):
            for name, tensor in _stored(source, piece, layout, kept).items():
                out.add(name, tensor)
            tell(done, len(layers))
        out.metadata |= exact.write(kept)


def _absent(source: Source) -> dict[str, Exact]:
    """Optional tensors that the published file this comes from does not have, which its layout would have room for."""
    if not isinstance(source, PublishedSource):
        return {name: Exact(source[name]) for name in source if name.startswith(RECORDS) and source.shape(name) == (0,)}
    if source.layout == nunchaku_lite.METHOD:
        return {name: Exact(value) for name, value in source.records.items()}
    names = [name for piece in source.pieces for name in piece.stored() if name.endswith(".smooth_orig")]
    return {RECORDS + name: Exact(exact.ABSENT) for name in names if name not in source.files}


def _stored(source: Source, piece: Piece, layout: str, kept: dict[str, Exact]) -> dict[str, Tensor]:
    """Stored tensors of a piece, read back and compared; canonical values they would lose go into `kept`."""
    if isinstance(source, PublishedSource) and (same := source.as_stored(piece, layout)) is not None:
        kept.update(source.exact_of(piece))
        return same
    tensors = {name: source[name] for name in (*piece.canonical(), *piece.optional()) if name in source}
    stored = piece.encode(tensors)
    records = {name: source[RECORDS + name] for name in piece.stored() if RECORDS + name in source}
    if records:
        absent = {name for name, tensor in records.items() if not tensor.numel()}
        trial = {name: tensor for name, tensor in (stored | records).items() if name not in absent}
        if _fits(piece, trial) and _same_layer(piece.decode(trial), tensors):
            stored = trial
    kept.update(_lost(source, piece, tensors, stored))
    return stored


def _fits(piece: Piece, stored: Mapping[str, Tensor]) -> bool:
    """Whether recorded tensors have the shapes of this layout: they may be those of another."""
    return all(kind.fits(tuple(stored[name].shape)) for name, kind in piece.stored().items() if name in stored)


_VECTORS = (".bias", ".smooth_orig", *FACTORS)


def _lost(
    source: Source, piece: Piece, tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, Exact]:
    """Vectors of `tensors` that reading `stored` would not give back. Raises CheckpointError for any other loss."""
    back = piece.decode(stored)
    lost = {name for name, tensor in tensors.items() if name not in back or not same_bits(back[name], tensor)}
    if unsaved := sorted(name for name in lost if not name.endswith(_VECTORS)):
        raise CheckpointError(f"{source.path}: {unsaved[0]} does not survive in the layout that was asked for")
    extra = {name for name in back.keys() - tensors.keys() if name.endswith(FACTORS)}
    linears = {name.rpartition(".")[0] for name in lost | extra if name.endswith(FACTORS)}
    lost |= {name for name in tensors if name.endswith(FACTORS) and name.rpartition(".")[0] in linears}
    crc = exact.checksum(stored)
    kept = {name: Exact(tensors[name], None if _rounded(name, back) else crc) for name in lost}
    return kept | {name: Exact(exact.ABSENT, crc) for name in extra}


def _rounded(name: str, back: Mapping[str, Tensor]) -> bool:
    """Whether the stored form has the vector, with fewer bits."""
    return name in back and name.endswith(".bias")


def _same_layer(back: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether records still describe the canonical tensors; folded biases may differ by rounding."""
    if back.keys() != tensors.keys():
        return False
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            if not torch.allclose(back[name].double(), tensor.double(), rtol=2.0**-7, atol=2.0**-18):
                return False
        elif not same_bits(back[name], tensor):
            return False
    return True


def _refuse_strangers(source: Source, details: Quantization) -> None:
    """Raise CheckpointError for a tensor that no layer of the model has, as far as its layers are known here."""
    if details.keep or details.model_class not in nunchaku.CLASSES:
        return
    try:
        layers = nunchaku.pieces_for(details.model_class, details.config, details.weight, details.rank, list(source))
    except (KeyError, TypeError, ValueError):  # a width or a configuration that only loading or nunchaku_lite takes
        return
    known = {name for piece in layers for name in (*piece.canonical(), *piece.optional())}
    extra = sorted(name for name in source if name not in known and not name.startswith(RECORDS))
    if extra:
        raise CheckpointError(f"{source.path}: {extra[0]} is of no layer of this model ({len(extra)} such tensors)")
