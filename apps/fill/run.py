"""A part of a picture painted anew, in 16 bits and in 4, side by side.

python apps/fill/run.py --help
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    # Started as a script from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from apps.common import App, controls
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from PIL import Image

    from engine import Request

HERE = Path(__file__).parent / "examples"


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The picture and its mask at the size to be painted; the picture fills it and what sticks out is cut off."""
    from PIL import Image, ImageOps

    from apps.common.uploads import open_picture
    from apps.fill.masks import mask_of

    canvas, size = values.get("canvas") or {}, (values["width"], values["height"])
    picture = ImageOps.fit(open_picture(canvas, "canvas"), size, Image.Resampling.LANCZOS)
    return {
        "image": picture,
        "mask_image": mask_of(canvas, values.get("mask"), size, values["grow"], values["invert"]),
    }


def finish(painted: Image.Image, request: Request) -> Image.Image:
    """Every pixel outside the mask and its seam is the visitor's own."""
    from apps.fill.masks import paste_back

    return paste_back(painted, request.inputs["image"], request.inputs["mask_image"])


def example(prompt: str, name: str) -> dict[str, Any]:
    """A picture with a part of it marked."""
    picture = HERE / f"{name}.png"
    return {
        "prompt": prompt,
        "canvas": {"background": picture, "layers": [HERE / f"{name}-mask.png"], "composite": picture},
    }


APP = App(
    slug="fill",
    title="Fill",
    summary="Paint over a part of a picture and say what shall be there; the rest stays as it is, to the last bit.",
    nibble=0b0111,
    models=("tiny-fill", "fill"),
    controls=(
        controls.prompt("a large green sphere"),
        controls.canvas("canvas", "Paint over what shall change", "A mapping: background, and layers with strokes."),
        controls.seed(),
        controls.number("grow", "Grow the mask", (0, 32, 4), "Pixels by which the marked part is widened"),
        controls.check("invert", "Turn the mask over", "Paint anew all but the marked part."),
        controls.picture("mask", "Mask from a file", "A mask, white where to paint.", place="options"),
        controls.steps(),
        controls.guidance(),
        controls.style(),
        *controls.size(),
    ),
    examples=(
        example("a large green sphere", "pair"),
        example("a white cone", "one"),
        example("a small yellow metal cube", "three"),
    ),
    prepare=prepare,
    finish=finish,
    seen=("mask_image", "The mask, white where it paints"),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
