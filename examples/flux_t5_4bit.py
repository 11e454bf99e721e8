"""FLUX.1 with the T5 text encoder in 4 bits as well, for cards with little memory, in an unmodified diffusers pipeline.

python examples/flux_t5_4bit.py                    [dev], fetched from the hub
python examples/flux_t5_4bit.py --pipeline DIR --transformer FILE --encoder FILE --device cpu
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer, SVDQuantT5Encoder


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
    parser.add_argument("--out", type=Path, default=Path("flux.1-dev-int4-t5.png"))
    options = parser.parse_args()

    pipe = FluxPipeline.from_pretrained(
        options.pipeline,
        transformer=SVDQuantFluxTransformer.from_pretrained(options.transformer, device=options.device),
        text_encoder_2=SVDQuantT5Encoder.from_pretrained(options.encoder, device=options.device),
        dtype=torch.bfloat16,
    ).to(options.device)
    image = pipe(
        options.prompt, height=options.size, width=options.size, num_inference_steps=options.steps,
        guidance_scale=3.5, max_sequence_length=options.text,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]  # fmt: skip
    image.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
