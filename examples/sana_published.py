"""SANA from a published 4-bit file (nunchaku's, or your own) inside an unmodified diffusers pipeline.

python examples/sana_published.py                  SANA 1.6B, fetched from the hub
python examples/sana_published.py --transformer zoo/weights/sana-tiny-int4 --pipeline zoo/weights/sana-tiny \\
    --prompt "a red matte sphere on a grey floor" --size 256 --text 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import SanaPipeline

from engine import SVDQuantSanaTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--transformer",
        default="nunchaku-tech/nunchaku-sana/svdq-int4_r32-sana1.6b.safetensors",
        help="4-bit checkpoint: a file, a folder or owner/repo/file.safetensors (default: SANA 1.6B)",
    )
    add("--pipeline", default="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", help="folder or hub id")
    add("--prompt", default="A cat holding a sign that says hello world")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=4.5)
    add("--size", type=int, default=1024, help="pixels of a side")
    add("--text", type=int, default=300, help="length of the text in tokens")
    add("--seed", type=int, default=7)
    add("--device", default="auto", help="auto, cpu or cuda[:index]")
    add("--out", type=Path, default=Path("sana-published.png"))
    options = parser.parse_args()

    transformer = SVDQuantSanaTransformer.from_pretrained(options.transformer, device=options.device)
    # All of it in BF16: the autoencoder and the text encoder too, which the repository may keep in 32 bits.
    pipe = SanaPipeline.from_pretrained(options.pipeline, transformer=transformer, dtype=torch.bfloat16)
    image = pipe.to(transformer.device)(
        options.prompt, height=options.size, width=options.size, num_inference_steps=options.steps,
        guidance_scale=options.guidance, max_sequence_length=options.text,
        generator=torch.Generator("cpu").manual_seed(options.seed),
    ).images[0]  # fmt: skip
    image.save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
