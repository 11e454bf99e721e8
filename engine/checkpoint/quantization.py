"""The metadata of a canonical checkpoint: which model it is of, and how its linears are quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import CheckpointError

__all__ = ["FORMAT", "RECORDS", "Quantization", "read_quantization"]

FORMAT = "nibble-canonical"
# Tensors under this prefix only serve to write a published file again bit for bit; no model reads them.
RECORDS = "published."


class _WithMetadata(Protocol):
    path: Path
    metadata: dict[str, str]


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint's metadata says of how it was made.

    `keep` holds name patterns of linears that stay in 16 bits. `shared_inputs` says that linears which read one input
    (q, k and v) share its smooth factor and down-projection, so that they can run as one.
    """

    model_class: str
    config: Mapping[str, Any]
    weight: str
    group_size: int
    rank: int
    keep: tuple[str, ...] = ()
    shared_inputs: bool = True

    def metadata(self) -> dict[str, str]:
        """Safetensors metadata that `read_quantization` reads back."""
        details: dict[str, Any] = {
            "method": "svdquant",
            "weight": {"dtype": self.weight, "group_size": self.group_size},
            "rank": self.rank,
            "keep_16bit": list(self.keep),
        }
        if not self.shared_inputs:
            details["shared_inputs"] = False
        return {
            "format": FORMAT,
            "model_class": self.model_class,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "quantization_config": json.dumps(details, sort_keys=True),
        }


def read_quantization(files: _WithMetadata) -> Quantization:
    """Read the metadata of a canonical checkpoint; raises CheckpointError when it is of another kind."""
    data = files.metadata
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{files.path}: expected a 4-bit checkpoint with metadata format={FORMAT!r}, got {data.get('format')!r};"
            " 16-bit weights are loaded with --precision bf16"
        )
    try:
        details = json.loads(data["quantization_config"])
        return Quantization(
            model_class=data["model_class"],
            config=dict(json.loads(data["config"])),
            weight=str(details["weight"]["dtype"]),
            group_size=int(details["weight"]["group_size"]),
            rank=int(details["rank"]),
            keep=tuple(details.get("keep_16bit", ())),
            shared_inputs=bool(details.get("shared_inputs", True)),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.path}: its metadata is incomplete or damaged ({error!r})") from error
