"""The same with the T5 text encoder in 4 bits as well, for cards with little memory."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer, SVDQuantT5Encoder

transformer = SVDQuantFluxTransformer.from_pretrained(
    "nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
)
text_encoder_2 = SVDQuantT5Encoder.from_pretrained("nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors")
pipe = FluxPipeline.from_pretrained(
    "black-forest-labs/FLUX.1-dev",
    transformer=transformer,
    text_encoder_2=text_encoder_2,
    torch_dtype=torch.bfloat16,
).to("cuda")
image = pipe("A cat holding a sign that says hello world", num_inference_steps=28, guidance_scale=3.5).images[0]
image.save("flux.1-dev-int4-t5.png")
