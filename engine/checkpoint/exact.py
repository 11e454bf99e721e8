"""Canonical vectors that a published file rounds or has no place for, carried in its metadata so that they come back.

Published biases are 16-bit with a 1 or a GELU shift folded in, which costs bits; NVFP4 scale factors may have to be
spelled another way; nunchaku_lite has no calibration values. Other readers ignore the entry.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.checkpoint.quantization import RECORDS
from engine.errors import CheckpointError

__all__ = ["ABSENT", "KEY", "Exact", "checksum", "is_record", "read", "write"]

KEY = "nibble_exact"
# Stands for a tensor that was not there.
ABSENT = torch.empty(0, dtype=torch.uint8)
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


class Exact(NamedTuple):
    """A canonical vector, and the checksum of the stored ones that it belongs to (None: agreement is looked at)."""

    value: Tensor
    belongs: int | None = None


class _WithMetadata(Protocol):
    path: Path
    metadata: dict[str, str]


def checksum(stored: Mapping[str, Tensor]) -> int:
    """CRC-32 of the vectors among a layer's stored tensors."""
    crc = 0
    for name in sorted(stored):
        if stored[name].ndim == 1:
            crc = zlib.crc32(_bytes(stored[name]), zlib.crc32(name.encode(), crc))
    return crc


def write(vectors: Mapping[str, Exact]) -> dict[str, str]:
    """Metadata entries for vectors by canonical name; none for none."""
    if not vectors:
        return {}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    entries: dict[str, list[str | int]] = {}
    for name, (value, belongs) in sorted(vectors.items()):
        entries[name] = [names[value.dtype], base64.b64encode(_bytes(value)).decode("ascii")]
        if belongs is not None:
            entries[name].append(belongs)
    return {KEY: json.dumps(entries, separators=(",", ":"))}


def read(files: _WithMetadata) -> dict[str, Exact]:
    """What `write` stored; raises CheckpointError when the entry is damaged."""
    if KEY not in files.metadata:
        return {}
    try:
        entries = json.loads(files.metadata[KEY])
        return {name: _entry(*entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, binascii.Error) as error:
        raise CheckpointError(f"{files.path}: its {KEY} metadata is damaged ({error!r})") from error


def is_record(name: str, value: Tensor) -> bool:
    """Whether an entry only says that a stored tensor was not there."""
    return name.startswith(RECORDS) and not value.numel()


def _entry(kind: str, data: str, belongs: int | None = None) -> Exact:
    raw = bytearray(base64.b64decode(data, validate=True))
    dtype = _DTYPES[kind]
    return Exact(torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype), belongs)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
