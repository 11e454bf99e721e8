"""FLUX.1 Redux: variations of a picture, or of several mixed.

python examples/flux_redux.py                  the small model that ships with the project
python examples/flux_redux.py --model redux
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from engine import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="tiny-redux", help="a name of the catalogue (engine.models.catalogue) or a folder"
    )
    parser.add_argument("--precision", default="int4", help="int4 or bf16")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--pictures", type=Path, nargs="+", help="default: a red ball")
    parser.add_argument("--weights", type=float, nargs="+", help="how much each picture counts (default: the same)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("flux_redux.png"))
    options = parser.parse_args()
    engine = Engine.load(options.model, options.precision)
    if options.pictures:
        pictures = [Image.open(path).convert("RGB") for path in options.pictures]
    else:
        pictures = [Image.new("RGB", (256, 256), "lightgrey")]
        ImageDraw.Draw(pictures[0]).ellipse((84, 96, 172, 184), fill="red")
    inputs = {"images": pictures, "weights": options.weights}
    request = Request(options.prompt, seed=options.seed, steps=options.steps, inputs=inputs)
    result = engine.run(request)
    result.save(options.out)
    print(f"{options.out}: {result.ms_per_step:.0f} ms a step, {result.backend}")


if __name__ == "__main__":
    main()
