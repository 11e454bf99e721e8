"""FLUX.1 from a published 4-bit file (nunchaku's, or your own) inside an unmodified diffusers pipeline.

python examples/flux_published.py                  [schnell], fetched from the hub
python examples/flux_published.py --transformer svdq-int4_r32-flux.1-dev.safetensors \\
    --pipeline black-forest-labs/FLUX.1-dev --steps 28 --guidance 3.5
python examples/flux_published.py --transformer zoo/weights/flux-tiny-int4 --pipeline zoo/weights/flux-tiny \\
    --prompt "a red matte sphere on a grey floor" --steps 12 --guidance 4.5 --size 256 --text 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxPipeline

from engine import SVDQuantFluxTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--transformer",
        default="nunchaku-tech/nunchaku-flux.1-schnell/svdq-int4_r32-flux.1-schnell.safetensors",
        help="4-bit checkpoint of any layout: a file, a folder or owner/repo/file.safetensors (default: [schnell])",
    )
    add("--pipeline", default="black-forest-labs/FLUX.1-schnell", help="folder or hub id of all the rest")
    add("--prompt", default="A cat holding a sign that says hello world")
    add("--steps", type=int, default=4, help="4 suit [schnell], 28 [dev]")
    add("--guidance", type=float, default=0.0, help="[schnell] reads none (0); 3.5 suits [dev]")
    add("--size", type=int, default=1024, help="pixels of a side")
    add("--text", type=int, default=256, help="length of the text in tokens; [dev] takes up to 512")
    add("--seed", type=int, default=7)
    add("--device", default="auto", help="auto, cpu or cuda[:index]")
    add("--out", type=Path, default=Path("flux-published.png"))
    options = parser.parse_args()

    transformer = SVDQuantFluxTransformer.from_pretrained(options.transformer, device=options.device)
    pipe = FluxPipeline.from_pretrained(options.pipeline, transformer=transformer, dtype=torch.bfloat16)
    image = pipe.to(transformer.device)(
        options.prompt, height=options.size, width=options.size, num_inference_steps=options.steps,
        guidance_scale=options.guidance, max_sequence_length=options.text,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]  # fmt: skip
    image.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
