"""Several LoRAs at once, each with its own strength; any format, no conversion.

python examples/flux_several_loras.py fast.safetensors 1.0 style.safetensors 0.8 "a house by the sea"
"""

from __future__ import annotations

import sys

from engine import Engine, Request
from engine.lora import list_loras, load_loras

*pairs, prompt = sys.argv[1:]
engine = Engine.load("flux.1-dev", "int4")
load_loras(engine, [(path, float(strength), None) for path, strength in zip(pairs[::2], pairs[1::2], strict=True)])
for lora in list_loras(engine):
    print(f"{lora.name}: {lora.strength}")
engine.run(Request(prompt, seed=7, steps=8)).save("several-loras.png")
