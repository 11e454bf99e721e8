"""Several LoRAs at once, each with its own strength; any format, no conversion.

python examples/flux_several_loras.py one.safetensors 1.0 other.safetensors 0.8                  on the small model
python examples/flux_several_loras.py fast.safetensors 1.0 style.safetensors 0.8 --model flux.1-dev --steps 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine import Engine, Request
from engine.lora import list_loras, load_loras


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", nargs="+", metavar="LORA STRENGTH", help="files or hub ids, each with its strength")
    parser.add_argument("--model", default="tiny", help="a name of the catalogue (engine.models.catalogue) or a folder")
    parser.add_argument("--prompt", default="a large red metal sphere left of a small blue cube")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("several-loras.png"))
    options = parser.parse_args()
    files, strengths = options.loras[::2], options.loras[1::2]
    if len(files) != len(strengths):
        parser.error(f"loras: expected a strength after each file, got nothing after {files[-1]}")

    engine = Engine.load(options.model, "int4")
    load_loras(engine, [(file, float(strength), None) for file, strength in zip(files, strengths, strict=True)])
    for lora in list_loras(engine):
        print(f"{lora.name}: {lora.strength}")
    engine.run(Request(options.prompt, seed=options.seed, steps=options.steps)).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
