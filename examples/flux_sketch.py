"""Sketch to image in one step: dark lines on a light page.

python examples/flux_sketch.py                  the small model that ships with the project
python examples/flux_sketch.py --model sketch
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from engine import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny-sketch", help="a name of the catalogue (engine.models.catalogue) or a folder"
    )
    parser.add_argument("--precision", default="int4", help="int4 or bf16")
    parser.add_argument("--prompt", default="a red matte sphere on a grey floor")
    parser.add_argument("--sketch", type=Path, help="drawing (default: the outline of a ball)")
    parser.add_argument("--alpha", type=float, default=0.4, help="0 to 1: how closely the drawing is kept to")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("flux_sketch.png"))
    options = parser.parse_args()
    engine = Engine.load(options.model, options.precision)
    if options.sketch:
        sketch = Image.open(options.sketch).convert("RGB")
    else:
        sketch = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(sketch).ellipse((84, 96, 172, 184), outline="black", width=2)
    request = Request(
        options.prompt, seed=options.seed, steps=options.steps, inputs={"sketch": sketch, "alpha": options.alpha}
    )
    result = engine.run(request)
    result.save(options.out)
    print(f"{options.out}: {result.ms_per_step:.0f} ms a step, {result.backend}")


if __name__ == "__main__":
    main()
