"""FLUX.1 [dev] in 4 bits on a small card: text encoders leave the GPU before the transformer enters it."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer, SVDQuantT5Encoder

MODEL = "black-forest-labs/FLUX.1-dev"
HUB = "nunchaku-tech"
prompt = "A cat holding a sign that says hello world"

encoder = FluxPipeline.from_pretrained(
    MODEL,
    transformer=None,
    vae=None,
    text_encoder_2=SVDQuantT5Encoder.from_pretrained(f"{HUB}/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors"),
    torch_dtype=torch.bfloat16,
).to("cuda")
with torch.inference_mode():
    embeds, pooled, _ = encoder.encode_prompt(prompt, prompt_2=None)
del encoder
torch.cuda.empty_cache()

pipe = FluxPipeline.from_pretrained(
    MODEL,
    text_encoder=None,
    text_encoder_2=None,
    transformer=SVDQuantFluxTransformer.from_pretrained(
        f"{HUB}/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
    ),
    torch_dtype=torch.bfloat16,
).to("cuda")
image = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=28, guidance_scale=3.5).images[0]
image.save("flux.1-dev-int4-offload.png")
