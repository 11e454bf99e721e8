"""Pictures from line drawings in one step, in 16 bits and in 4, side by side.

python apps/sketch/run.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apps.common import App, controls
from apps.sketch import READINGS
from engine import RequestError
from engine.models.catalogue import ModelSpec

HERE = Path(__file__).parent / "examples"


def usual_guidance(spec: ModelSpec) -> float:
    """The published sampler's default; the small model wants more."""
    return 0.5 if spec.ships else 0.28


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The drawing at the size to be painted, and the picture of it that the model really sees."""
    from apps.sketch.drawing import drawing_of, seen_by_the_model

    size = (values["width"], values["height"])
    drawing = drawing_of(values.get("canvas") or {}, size, values["reading"])
    if not values["prompt"].strip() and drawing.getextrema() == (255, 255):
        raise RequestError("canvas", "canvas: nothing is drawn and the prompt is empty; draw or write something")
    alpha = controls.check_number("sketch_guidance", values["sketch_guidance"], (0.0, 1.0))
    return {"sketch": drawing, "alpha": alpha, "seen": seen_by_the_model(drawing)}


def example(prompt: str, name: str) -> dict[str, Any]:
    """A drawing and what it shall become."""
    page = HERE / f"{name}.png"
    return {"prompt": prompt, "canvas": {"background": page, "layers": [], "composite": page}}


APP = App(
    slug="sketch",
    title="Sketch to picture",
    summary="Draw a few lines, say what they are, and it is painted after each stroke: in 16 bits and in 4.",
    nibble=0b0101,
    models=("tiny-sketch", "sketch"),
    controls=(
        controls.prompt("a large green sphere and a red cube", needed=False),
        controls.sketchpad("canvas", "Draw here", "A mapping: background (a drawing or a photo), layers with strokes."),
        controls.decimal(
            "sketch_guidance", "Sketch guidance", (0.0, 1.0, usual_guidance),
            "How closely to follow; 0 ignores the drawing", step=0.01, place="under",
        ),
        controls.seed(),
        controls.choice("reading", "An uploaded picture", READINGS, "How lines are made of it"),
        *controls.style(),
        *controls.size(),
    ),
    examples=(
        example("a blue cube to the left of a red sphere", "cube-sphere"),
        example("a purple cone", "cone"),
        example("a cyan metal cone and a white cylinder", "cone-cylinder"),
    ),
    large_examples=(
        example("a wooden toy block beside a ripe tomato", "cube-sphere"),
        example("a snowy volcano at dusk", "cone"),
        example("a paper party hat and a tin of paint", "cone-cylinder"),
    ),
    prepare=prepare,
    seen=("seen", "What the model sees of it"),
    live="canvas",
    about=(
        "<p>One step: the drawing is mixed into the noise, and a LoRA taught the painter to read it. “Sketch guidance” "
        "is both the drawing’s share of the noise and the strength of that LoRA.</p>"
    ),
)  # fmt: skip

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
