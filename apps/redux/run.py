"""Variations of a picture and mixes of several, in 16 bits and in 4, side by side.

python apps/redux/run.py --help
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
from engine import RequestError
from engine.models.catalogue import ModelSpec

HERE = Path(__file__).parent / "examples"
SLOTS = (("picture", "weight"), ("second", "second_weight"), ("third", "third_weight"))


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The pictures that are there, whole, with their weights, and how much pictures and prompt count."""
    from apps.common.uploads import open_painted, open_picture

    found = [(open_painted(values.get(slot), slot), weight) for slot, weight in SLOTS]
    given = [(picture, weight) for picture, weight in found if picture is not None]
    if not given:
        open_picture(None, "picture")  # says what is missing
    weights = [controls.check_number(weight, values[weight], (0.0, 2.0)) for _, weight in given]
    if not any(weights):
        raise RequestError("weight", "weight: expected one picture at least to count, got 0 for all")
    return {
        "images": [picture for picture, _ in given],
        "weights": weights,
        "image_strength": controls.check_number("image_strength", values["image_strength"], (0.0, 1.0)),
        "prompt_strength": controls.check_number("prompt_strength", values["prompt_strength"], (0.0, 3.0)),
    }


def weight(name: str, label: str, place: str) -> controls.Control:
    """How much one of the pictures counts beside the others."""
    return controls.decimal(name, label, (0.0, 2.0, 1.0), "Counts beside the other pictures' weights", place=place)


def also(name: str, label: str) -> controls.Control:
    """Another picture to mix in."""
    return controls.photo(name, label, f"{label}, mixed with the first; optional.", place="more")


APP = App(
    slug="redux",
    title="Variations",
    summary="Show a picture, or mix up to three, and get new ones of their kind: in 16 bits and in 4.",
    nibble=0b1011,
    models=("tiny-redux", "redux"),
    controls=(
        controls.prompt("leave it empty, or say what shall be different", needed=False),
        controls.photo("picture", "Picture to vary", "The picture whose kind the new one is of."),
        also("second", "Second picture"),
        weight("second_weight", "Weight of the second", "more"),
        also("third", "Third picture"),
        weight("third_weight", "Weight of the third", "more"),
        weight("weight", "Weight of the first", "more"),
        controls.seed(),
        controls.decimal("image_strength", "Strength of the pictures", (0.0, 1.0, 1.0), "Less: freer variations"),
        controls.decimal("prompt_strength", "Strength of the prompt", (0.0, 3.0, 1.0), "Without a prompt: no effect"),
        *usual.options(),
    ),
    examples=(
        {"prompt": "", "picture": HERE / "sphere.png", "second": None, "third": None},
        {"prompt": "", "picture": HERE / "pair.png", "second": None, "third": None},
        {"prompt": "", "picture": HERE / "sphere.png", "second": HERE / "cone.png", "third": None},
    ),
    large_examples=(
        {"prompt": "", "picture": HERE / "sphere.png", "second": None, "third": None},
        {"prompt": "as a watercolour on rough paper", "picture": HERE / "pair.png", "second": None, "third": None},
        {"prompt": "in a snowy forest", "picture": HERE / "sphere.png", "second": HERE / "cone.png", "third": None},
    ),
    titles=("a variation of a sphere", "a variation of two things", "a mix of a sphere and a cone"),
    prepare=prepare,
    reuse="picture",
    about=(
        "<p>A vision tower reads each picture and speaks of it in the words the painter understands; the words of "
        "several pictures are mixed by their weights. Nothing of the picture itself is copied.</p>"
    ),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
