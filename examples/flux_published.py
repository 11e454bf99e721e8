"""FLUX.1 [schnell] from nunchaku's published 4-bit file, inside an unmodified diffusers pipeline."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer

transformer = SVDQuantFluxTransformer.from_pretrained(
    "nunchaku-tech/nunchaku-flux.1-schnell/svdq-int4_r32-flux.1-schnell.safetensors"
)
pipe = FluxPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-schnell", transformer=transformer, torch_dtype=torch.bfloat16
).to("cuda")
image = pipe("A cat holding a sign that says hello world", num_inference_steps=4, guidance_scale=0).images[0]
image.save("flux.1-schnell-int4.png")
