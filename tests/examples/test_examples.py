"""Each example that has a small model runs with it and leaves a picture."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [
    *(f"flux_{kind}" for kind in ("schnell", "dev", "canny", "depth", "fill", "redux", "sketch")),
    "sana",
    "sana_pag",
]


@pytest.mark.parametrize("name", NAMES)
def test_it_paints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "picture.png"
    steps = [] if name == "flux_sketch" else ["--steps", "2"]
    monkeypatch.setattr(sys, "argv", [name, "--out", str(out), *steps])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    with Image.open(out) as picture:
        low, high = picture.convert("L").getextrema()
        assert high - low > 20
