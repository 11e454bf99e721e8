"""Pictures that follow the edges or the depth of another, in 16 bits and in 4, side by side.

python apps/depth_canny/run.py --help
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
from engine.models.catalogue import ModelSpec, zoo_folder

HERE = Path(__file__).parent
LARGE_ESTIMATOR = "depth-anything/Depth-Anything-V2-Small-hf"


def follows_edges(spec: ModelSpec) -> bool:
    """Whether the model reads edges; the others read depth."""
    return "canny" in spec.name.lower()


def prepare(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The control map, at the size to be painted; the picture fills it and what sticks out is cut off."""
    from PIL import Image, ImageOps

    from apps.common.uploads import open_painted, open_picture
    from apps.depth_canny import maps

    picture = open_painted(values.get("picture"), "picture") or open_picture(None, "picture")
    picture = ImageOps.fit(picture, (values["width"], values["height"]), Image.Resampling.LANCZOS)
    if values.get("ready"):
        return {"control_image": picture}
    read = maps.reduced(picture, controls.check_number("detail", values["detail"], (10, 100)) / 100)
    if follows_edges(spec):
        low, high = (controls.check_number(name, values[name], (0, 255)) for name in ("low", "high"))
        found = maps.edges(read, low, high)
    else:
        found = maps.depth(read, str(zoo_folder() / "depth-estimator-tiny") if spec.ships else LARGE_ESTIMATOR)
    return {"control_image": found.resize(picture.size, Image.Resampling.BILINEAR)}


APP = App(
    slug="depth_canny",
    title="Depth and edges",
    summary="Keep the layout of a picture, its depth or its edges, and paint it anew from words: in 16 bits and in 4.",
    nibble=0b0011,
    models=("tiny-depth", "tiny-canny", "depth", "canny"),
    controls=(
        controls.prompt("a large blue metal sphere and a red cube under a pink sky"),
        controls.photo("picture", "Picture to follow", "The picture whose depth or edges the new one keeps."),
        controls.seed(),
        controls.number("low", "Lower threshold", (0, 255, 100), "Edges weaker than this are dropped", follows_edges),
        controls.number("high", "Upper threshold", (0, 255, 200), "Edges stronger than this are kept", follows_edges),
        controls.number(
            "detail", "Detail of the map", (10, 100, 100), "Percent of the size to be painted; less keeps less"
        ),
        controls.check("ready", "My picture is already a map", "Use it as it is: bright is near, or white edges."),
        *usual.options(),
    ),
    examples=(
        {"prompt": "a yellow metal sphere and a green cube", "picture": HERE / "examples" / "pair.png"},
        {"prompt": "a purple cone, a white cube and an orange sphere", "picture": HERE / "examples" / "three.png"},
        {"prompt": "a cyan cylinder on a brown floor", "picture": HERE / "examples" / "one.png"},
    ),
    large_examples=(
        {"prompt": "two stone lanterns in a moss garden after rain", "picture": HERE / "examples" / "pair.png"},
        {"prompt": "perfume bottles on wet slate, studio light", "picture": HERE / "examples" / "three.png"},
        {"prompt": "a clay pot on a workbench by a window, photograph", "picture": HERE / "examples" / "one.png"},
    ),
    reuse="picture",
    prepare=prepare,
    seen=("control_image", "What the model follows"),
)

if __name__ == "__main__":
    from apps.common.cli import main

    raise SystemExit(main(APP))
