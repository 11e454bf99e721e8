"""The metadata of a canonical checkpoint: which model it is of, and how its linears are quantized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import CheckpointError

__all__ = ["FORMAT", "RECORDS", "Quantization", "check_sizes", "read_quantization"]

FORMAT = "nibble-canonical"
# Tensors under this prefix only serve to write a published file again bit for bit; no model reads them.
RECORDS = "published."
_MAX_SIZE, _MAX_SIDE = 2**20, 512


class _WithMetadata(Protocol):
    path: Path
    metadata: dict[str, str]


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint's metadata says of how it was made.

    `keep` holds name patterns of linears that stay in 16 bits. `shared_inputs` says that linears which read one input
    (q, k and v) share its smooth factor and down-projection, so that they can run as one. `gelu_shift` says that 4-bit
    activations of GELU outputs are shifted to have no sign.
    """

    model_class: str
    config: Mapping[str, Any]
    weight: str
    group_size: int
    rank: int
    keep: tuple[str, ...] = ()
    shared_inputs: bool = True
    gelu_shift: bool = True

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
        if not self.gelu_shift:
            details["gelu_shift"] = False
        return {
            "format": FORMAT,
            "model_class": self.model_class,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "quantization_config": json.dumps(details, sort_keys=True),
        }


def check_sizes(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Refuse sizes that no model of so many `tensors` has, before anything of such a size is built.

    Raises CheckpointError naming the entry of the model's configuration.
    """
    for key, value in config.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limit = tensors if key.endswith("_layers") else _MAX_SIDE if key == "sample_size" else _MAX_SIZE
        if not abs(value) <= limit:
            raise CheckpointError(f"{path}: its model config says {key} = {value!r}, expected at most {limit}")


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
            gelu_shift=bool(details.get("gelu_shift", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{files.path}: its metadata is incomplete or damaged ({error!r})") from error
