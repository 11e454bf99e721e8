"""Canonical biases that a published file must round, carried in its metadata so that reading gives them back.

Published biases are 16-bit with a 1 or a GELU shift folded in, which costs bits. Other readers ignore the entry.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.errors import CheckpointError

__all__ = ["KEY", "read", "write"]

KEY = "nibble_exact"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _WithMetadata(Protocol):
    path: Path
    metadata: dict[str, str]


def write(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata entries for 1-D float tensors by canonical name; none for no tensors."""
    if not tensors:
        return {}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries = {
        name: [names[tensor.dtype], base64.b64encode(_bytes(tensor)).decode("ascii")]
        for name, tensor in sorted(tensors.items())
    }
    return {KEY: json.dumps(entries, separators=(",", ":"))}


def read(files: _WithMetadata) -> dict[str, Tensor]:
    """The tensors that `write` stored; raises CheckpointError when the entry is damaged."""
    if KEY not in files.metadata:
        return {}
    try:
        entries = json.loads(files.metadata[KEY])
        return {
            name: torch.frombuffer(bytearray(base64.b64decode(data, validate=True)), dtype=_DTYPES[kind])
            for name, (kind, data) in entries.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, binascii.Error) as error:
        raise CheckpointError(f"{files.path}: its {KEY} metadata is damaged ({error!r})") from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
