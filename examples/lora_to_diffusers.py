"""Read one or more LoRAs of any format and write their weighted sum under diffusers' names.

python examples/lora_to_diffusers.py tests/data/lora/xlabs.safetensors --out out/xlabs.safetensors
python examples/lora_to_diffusers.py a.safetensors b.safetensors --strength 0.75 -0.5 --out out/both.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from engine.lora import compose, read_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", nargs="+")
    parser.add_argument("--strength", nargs="+", type=float)
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    loras = [read_lora(path) for path in options.loras]
    whole = loras[0]
    if options.strength or len(loras) > 1:
        whole = compose(list(zip(loras, options.strength or [1.0] * len(loras), strict=True)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(whole.tensors(), options.out)
    for name, (down, up) in sorted(whole.factors.items()):
        print(f"{name:60} rank {down.shape[0]:4} {down.shape[1]} -> {up.shape[0]}")
    for key in [*whole.left_out, *whole.unknown]:
        print(f"left out: {key}")


if __name__ == "__main__":
    main()
