"""FLUX.1 in 4 bits on a small card: text encoders leave the device before the transformer enters it.

python examples/flux_offload.py                    [dev], fetched from the hub
python examples/flux_offload.py --pipeline DIR --transformer FILE --encoder FILE --device cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer, SVDQuantT5Encoder


@torch.inference_mode()
def encode(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the prompt; the encoders are gone when this returns."""
    encoder = SVDQuantT5Encoder.from_pretrained(options.encoder, device=options.device)
    pipe = FluxPipeline.from_pretrained(
        options.pipeline, transformer=None, vae=None, text_encoder_2=encoder, dtype=torch.bfloat16
    ).to(options.device)
    embeds, pooled, _ = pipe.encode_prompt(options.prompt, prompt_2=None, max_sequence_length=options.text)
    return embeds, pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="black-forest-labs/FLUX.1-dev", help="hub id or folder")
    parser.add_argument(
        "--transformer", default="nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors"
    )
    parser.add_argument("--encoder", default="nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors")
    parser.add_argument("--prompt", default="A cat holding a sign that says hello world")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--text", type=int, default=512, help="length of the text in tokens")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("flux.1-dev-int4-offload.png"))
    options = parser.parse_args()

    embeds, pooled = encode(options)
    if options.device.startswith("cuda"):
        torch.cuda.empty_cache()
    transformer = SVDQuantFluxTransformer.from_pretrained(options.transformer, device=options.device)
    pipe = FluxPipeline.from_pretrained(
        options.pipeline, text_encoder=None, text_encoder_2=None, transformer=transformer, dtype=torch.bfloat16
    ).to(options.device)
    image = pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=options.size, width=options.size,
        num_inference_steps=options.steps, guidance_scale=3.5,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]  # fmt: skip
    image.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
