"""FLUX.1 Fill: paint over the white part of a mask.

python examples/flux_fill.py                  the small model that ships with the project
python examples/flux_fill.py --model fill
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from engine import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny-fill", help="a name of the catalogue (engine.models.catalogue) or a folder"
    )
    parser.add_argument("--precision", default="int4", help="int4 or bf16")
    parser.add_argument("--prompt", default="a green cube")
    parser.add_argument("--picture", type=Path, help="picture (default: a grey wall)")
    parser.add_argument("--mask", type=Path, help="mask of the same size (default: a box in the middle)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("flux_fill.png"))
    options = parser.parse_args()
    engine = Engine.load(options.model, options.precision)
    picture = Image.open(options.picture).convert("RGB") if options.picture else Image.new("RGB", (256, 256), "grey")
    if options.mask:
        mask = Image.open(options.mask).convert("L")
    else:
        mask = Image.new("L", picture.size)
        width, height = picture.size
        ImageDraw.Draw(mask).rectangle((width // 3, height // 3, 2 * width // 3, 2 * height // 3), fill=255)
    inputs = {"image": picture, "mask_image": mask}
    request = Request(options.prompt, seed=options.seed, steps=options.steps, inputs=inputs)
    result = engine.run(request)
    result.save(options.out)
    print(f"{options.out}: {result.ms_per_step:.0f} ms a step, {result.backend}")


if __name__ == "__main__":
    main()
