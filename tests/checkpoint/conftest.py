"""Where the published test data lies, and a reader that remembers it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"


@cache
def vectors(name: str) -> dict[str, Tensor]:
    """All tensors of a file below tests/data, read once."""
    return load_file(DATA / f"{name}.safetensors")
