"""Text to image with FLUX.1 [schnell].

python examples/flux_schnell.py                  the small model that ships with the project
python examples/flux_schnell.py --model schnell
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine import Engine, Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a name of the catalogue (engine.models.catalogue) or a folder")
    parser.add_argument("--precision", default="int4", help="int4 or bf16")
    parser.add_argument("--prompt", default="a red matte sphere on a grey floor")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("flux_schnell.png"))
    options = parser.parse_args()
    engine = Engine.load(options.model, options.precision)
    request = Request(options.prompt, seed=options.seed, steps=options.steps)
    result = engine.run(request)
    result.save(options.out)
    print(f"{options.out}: {result.ms_per_step:.0f} ms a step, {result.backend}")


if __name__ == "__main__":
    main()
