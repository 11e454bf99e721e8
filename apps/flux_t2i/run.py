"""Text to image with FLUX, in 16 bits and in 4, side by side.

python apps/flux_t2i/run.py --help
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started as a script from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apps.common import App, controls, usual

PLACEHOLDER = "a large red metal sphere left of a small blue cube"

APP = App(
    slug="flux_t2i",
    title="Text to image",
    summary="One prompt, painted twice from the same noise: by FLUX in 16 bits, and in 4.",
    nibble=0b0001,
    models=("tiny", "schnell", "dev"),
    controls=(
        controls.prompt(PLACEHOLDER),
        controls.seed(),
        *usual.options(),
    ),
    examples=(
        {"prompt": "a large red metal sphere left of a small blue cube"},
        {"prompt": "a yellow cone in front of a purple cylinder"},
        {"prompt": "a green cube, a white sphere and a blue cone"},
        {"prompt": "a cyan metal sphere under a pink sky"},
        {"prompt": "an orange cylinder on a checkered floor"},
    ),
    large_examples=(
        {"prompt": "a red fox asleep in autumn leaves, soft morning light"},
        {"prompt": "a hand-painted sign that reads NIBBLE above the door of a narrow bookshop"},
        {"prompt": "an astronaut watering tomatoes in a greenhouse on Mars"},
    ),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
