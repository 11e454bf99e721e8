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

from apps.common import App, controls, usual
from apps.fill import SIDES, TASKS
from engine import RequestError
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from PIL import Image

    from engine import Request

HERE = Path(__file__).parent / "examples"


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The picture and its mask at the size to be painted.

    To paint over a part, the picture fills that size and what sticks out is cut off; to widen it, it lies on the page.
    """
    from PIL import Image, ImageOps

    from apps.common.uploads import open_picture
    from apps.fill import masks

    canvas, size = values.get("canvas") or {}, (values["width"], values["height"])
    picture = open_picture(canvas, "canvas")
    if values["task"] not in TASKS:
        raise RequestError("task", f"task: expected one of {', '.join(TASKS)}, got {values['task']!r}")
    if values["task"] == TASKS[1]:
        share = controls.check_number("share", values["share"], (20, 100)) / 100
        overlap = int(controls.check_number("overlap", values["overlap"], (0, 64)))
        page, mask = masks.widened(picture, size, share, values["side"], overlap)
        return {"image": page, "mask_image": mask}
    grow = int(controls.check_number("grow", values["grow"], (0, 32)))
    return {
        "image": ImageOps.fit(picture, size, Image.Resampling.LANCZOS),
        "mask_image": masks.mask_of(canvas, values.get("mask"), size, grow, values["invert"]),
    }


def finish(painted: Image.Image, request: Request, values: Mapping[str, Any]) -> Image.Image:
    """Every pixel outside the mask and its seam is the visitor's own."""
    from apps.fill.masks import paste_back

    feather = controls.check_number("feather", values["feather"], (0, 32))
    return paste_back(painted, request.inputs["image"], request.inputs["mask_image"], feather)


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
        controls.canvas("canvas", "Your picture", "A mapping: background, and layers with strokes."),
        controls.choice("task", "What to do", TASKS, "Widening paints around it; nothing need be marked", "picture"),
        controls.seed(),
        controls.number("share", "Share of the page", (20, 100, 60), "Widening: what the picture takes, percent"),
        controls.choice("side", "Where the picture lies", SIDES, "Widening: at which side of the page"),
        controls.number("overlap", "Overlap", (0, 64, 8), "Widening: pixels of the picture that are painted anew"),
        controls.number("feather", "Soft seam", (0, 32, 6), "Pixels in which new passes into old"),
        controls.number("grow", "Grow the mask", (0, 32, 4), "Pixels by which the marked part is widened"),
        controls.check("invert", "Turn the mask over", "Paint anew all but the marked part."),
        controls.picture("mask", "Mask from a file", "A mask, white where to paint.", place="options"),
        *usual.options(),
    ),
    examples=(
        example("a large green sphere", "pair"),
        example("a white cone", "one"),
        example("a small yellow metal cube", "three"),
    ),
    large_examples=(
        example("a glass teapot on a linen cloth", "pair"),
        example("a small lighthouse of white stone", "one"),
        example("a sleeping ginger cat", "three"),
    ),
    prepare=prepare,
    finish=finish,
    reuse="canvas",
    seen=("mask_image", "The mask, white where it paints"),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
