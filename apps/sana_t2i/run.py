"""Text to image with SANA, in 16 bits and in 4, side by side.

python apps/sana_t2i/run.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apps.common import App, controls, usual
from engine.models.catalogue import ModelSpec

PAG_HELP = "Perturbed-attention guidance: sharper shapes for half as much time again; 0 is off"


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The strength of perturbed-attention guidance."""
    return {"pag_scale": controls.check_number("pag", values["pag"], (0.0, 10.0))}


APP = App(
    slug="sana_t2i",
    title="Text to image with SANA",
    summary="One prompt, painted twice from the same noise: by SANA's linear attention in 16 bits, and in 4.",
    nibble=0b1000,
    models=("tiny-sana", "sana"),
    controls=(
        controls.prompt("a large red metal sphere left of a small blue cube"),
        controls.seed(),
        controls.decimal("pag", "PAG scale", (0.0, 10.0, 0.0), PAG_HELP),
        *usual.options(),
    ),
    examples=(
        {"prompt": "a cyan sphere and a red cylinder under a blue sky"},
        {"prompt": "a small orange metal cylinder to the right of a large cyan cone"},
        {"prompt": "a large blue cylinder"},
        {"prompt": "a white cone on a brown floor"},
    ),
    large_examples=(
        {"prompt": "a lighthouse on a basalt cliff, long exposure, evening"},
        {"prompt": "a cyberpunk cat with a neon sign that says SANA"},
        {"prompt": "a bowl of ramen, steam, window light, photograph"},
    ),
    prepare=prepare,
    about=(
        "<p>The size you choose is the size that is painted. The original pipeline paints at the nearest of a fixed "
        "list of sizes and resizes the picture afterwards; here that binning is off.</p>"
    ),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
