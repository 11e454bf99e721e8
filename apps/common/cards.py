"""Draw the pictures of the house's first page: what an app was given and what it made, or what both precisions made.

python -m apps.common.cards            every app's first example, with its small model, on the CPU
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image, ImageOps

from apps.common import App, cli
from apps.common.runner import Finished, events

__all__ = ["card", "main"]

SIDE = 256


def card(app: App, seed: int) -> Image.Image:
    """Two squares side by side."""
    args = cli.parser(app).parse_args(["--model", app.models[0], "--device", "cpu"])
    studio = cli.open_studio(app, args)
    example = {name: _uploaded(value) for name, value in app.examples[0].items()}
    job = studio.job({**example, "seed": seed}, studio.pool.precisions)
    made = [event.result.image for event in events(studio.pool, job) if isinstance(event, Finished)]
    studio.pictures.close()
    given = _given(job.request.inputs)
    pair = [given, made[-1]] if given is not None else made[:2]
    out = Image.new("RGB", (2 * SIDE, SIDE))
    for number, picture in enumerate(pair):
        out.paste(ImageOps.fit(picture.convert("RGB"), (SIDE, SIDE)), (number * SIDE, 0))
    return out


def _given(inputs: Any) -> Image.Image | None:
    if "mask_image" in inputs:
        veil = Image.new("RGB", inputs["image"].size, "white")
        return Image.composite(veil, inputs["image"], inputs["mask_image"].convert("L"))
    for name in ("sketch", "control_image", "image"):
        if name in inputs:
            return inputs[name]
    return inputs["images"][0] if inputs.get("images") else None


def _uploaded(value: Any) -> Any:
    """An example's files as uploads are: copies in the upload folder."""
    if isinstance(value, dict):
        return {name: _uploaded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_uploaded(part) for part in value]
    if not isinstance(value, Path):
        return value
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.copy(value, Path(tempfile.mkdtemp(dir=folder)) / value.name)


def main() -> None:
    """Draw every card into the assets."""
    from apps.common.house import CARDS
    from apps.run import apps

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="slugs; default all")
    parser.add_argument("--out", type=Path, default=CARDS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for app in apps():
        if not args.only or app.slug in args.only:
            card(app, args.seed).save(args.out / f"{app.slug}.webp", quality=82, method=6)


if __name__ == "__main__":
    main()
