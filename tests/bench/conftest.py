"""The small model that ships, opened once for all tests of reports and benches."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.models.catalogue import resolve


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The INT4 checkpoint of the small FLUX."""
    path = Path(resolve("tiny").checkpoints["int4"])
    assert path.exists(), f"{path} is missing: it ships with the project"
    return path
