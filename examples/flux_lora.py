"""A LoRA on a 4-bit model: load it, change its strength without loading again, take it away.

python examples/flux_lora.py style.safetensors "GHIBSKY style, a house by the sea"
"""

from __future__ import annotations

import sys

from engine import Engine, Request
from engine.lora import load_lora, set_lora_strength, unload_lora

path, prompt = sys.argv[1:3]
engine = Engine.load("flux.1-dev", "int4")
request = Request(prompt, seed=7)

load_lora(engine, path, strength=1.0, name="style")
engine.run(request).save("lora-1.0.png")
set_lora_strength(engine, "style", 0.5)
engine.run(request).save("lora-0.5.png")
unload_lora(engine, "style")
engine.run(request).save("lora-none.png")
