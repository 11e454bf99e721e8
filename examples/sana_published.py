"""SANA 1.6B from nunchaku's published 4-bit file, inside an unmodified diffusers pipeline."""

from __future__ import annotations

import torch
from diffusers import SanaPipeline

from engine import SVDQuantSanaTransformer

transformer = SVDQuantSanaTransformer.from_pretrained("nunchaku-tech/nunchaku-sana/svdq-int4_r32-sana1.6b.safetensors")
pipe = SanaPipeline.from_pretrained(
    "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", transformer=transformer, torch_dtype=torch.bfloat16
).to("cuda")
pipe.vae.to(torch.bfloat16)
pipe.text_encoder.to(torch.bfloat16)
image = pipe("A cat holding a sign that says hello world", height=1024, width=1024, guidance_scale=4.5).images[0]
image.save("sana-int4.png")
