"""The published 4-bit T5 encoder: one file, linears weight-only, everything else under its transformers name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from engine.checkpoint.awq import T5Piece
from engine.checkpoint.files import TensorFiles
from engine.checkpoint.pieces import Copy, Piece
from engine.checkpoint.quantization import RECORDS, Quantization
from engine.checkpoint.source import PublishedSource, Source
from engine.errors import CheckpointError

__all__ = ["GROUP", "MODEL_CLASS", "metadata", "open_source", "pieces_for"]

MODEL_CLASS = "T5EncoderModel"
GROUP = 128
LAYOUT = "nunchaku"


def open_source(files: TensorFiles) -> PublishedSource:
    """The canonical view of a published T5 file; raises CheckpointError when something in it does not fit."""
    named = files.metadata.get("model_class")
    if named not in (None, MODEL_CLASS, "NunchakuT5EncoderModel"):
        raise CheckpointError(f"{files.path}: made for {named}, but its tensors are those of {MODEL_CLASS}")
    try:
        config = dict(json.loads(files.metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.path}: its metadata holds no T5 config ({error!r})") from error
    shapes = {name: files.shape(name) for name in files}
    for name, shape in shapes.items():
        if name.endswith(".qweight") and (len(shape) != 2 or not shape[0] or not shape[1] or shape[1] % GROUP):
            raise CheckpointError(
                f"{files.path}: {name} has shape {shape}, expected (N/4, K) with K a multiple of {GROUP}"
            )
    linears = {
        name.removesuffix(".qweight"): (4 * shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".qweight")
    }
    own = {f"{name}.{part}" for name in linears for part in ("qweight", "scales", "scaled_zeros")}
    others = {name: shape for name, shape in shapes.items() if name not in own}
    details = Quantization(MODEL_CLASS, config, "awq-int4", GROUP, 0)
    return PublishedSource(files, _pieces(linears, others), details.metadata(), LAYOUT)


def pieces_for(source: Source) -> list[Piece]:
    """Pieces of a canonical T5 checkpoint."""
    linears = {}
    for name in source:
        if name.endswith(".codes"):
            n, half = source.shape(name)
            linears[name.removesuffix(".codes")] = (n, 2 * half)
    own = {f"{name}.{part}" for name in linears for part in ("codes", "scales", "zeros")}
    others = {name: source.shape(name) for name in source if name not in own and not name.startswith(RECORDS)}
    return _pieces(linears, others)


def metadata(details: Quantization) -> dict[str, str]:
    """Metadata of a published T5 file."""
    return {"config": json.dumps(dict(details.config), indent=2), "model_class": "NunchakuT5EncoderModel"}


def _pieces(linears: Mapping[str, tuple[int, int]], others: Mapping[str, Iterable[int]]) -> list[Piece]:
    layers: list[Piece] = [T5Piece(name, n, k) for name, (n, k) in sorted(linears.items())]
    return layers + [Copy(name, name, tuple(shape)) for name, shape in sorted(others.items())]
