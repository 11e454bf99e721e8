"""A LoRA on a 4-bit model: load it, change its strength without loading again, take it away.

python examples/flux_lora.py my-lora/pytorch_lora_weights.safetensors          on the small model; see train_lora.py
python examples/flux_lora.py style.safetensors --model flux.1-dev --prompt "GHIBSKY style, a house by the sea"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from engine import Engine, Request
from engine.lora import load_lora, set_lora_strength, unload_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", help="a .safetensors file of any common format, or a hub id")
    parser.add_argument("--model", default="tiny", help="a name of the catalogue (engine.models.catalogue) or a folder")
    parser.add_argument("--prompt", default="a large red metal sphere left of a small blue cube")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.5])
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("lora"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    engine = Engine.load(options.model, "int4")
    request = Request(options.prompt, seed=options.seed, steps=options.steps)
    load_lora(engine, options.lora, name="style")
    for strength in options.strengths:
        set_lora_strength(engine, "style", strength)
        engine.run(request).save(options.out / f"strength-{strength:g}.png")
    unload_lora(engine, "style")
    engine.run(request).save(options.out / "none.png")
    print(f"{options.out}: {len(options.strengths) + 1} pictures")


if __name__ == "__main__":
    main()
