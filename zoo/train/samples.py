"""Contact sheets through the exported FluxPipeline itself, as a user gets it."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from zoo import scenes
from zoo.scenes.sheet import contact_sheet
from zoo.train.log import Log

WRITTEN = (
    "a large red metal sphere left of a small blue cube",
    "a small green cone in front of a large white cylinder",
    "a large yellow cube behind a small purple sphere",
    "a small orange metal cylinder to the right of a large cyan cone",
    "a red cube",
    "a tiny blue metal ball",
    "a large purple cone on a checkered floor",
    "a green sphere and a yellow cylinder and a red cone",
    "a big shiny green ball next to a tiny orange box",
    "a white cube left of a white cone",
    "two objects: a cyan sphere and a red cylinder under a blue sky",
    "a photo of a large metal cylinder in blue, highly detailed, 8k",
    "A SMALL RED SPHERE RIGHT OF A LARGE GREEN CUBE.",
    "a yellow cone in front of a blue cone",
    "a large orange cube against a grey wall",
    "a purple metal cube under a pink sky",
)


def prompts(count: int = 64) -> list[str]:
    """Prompts of the contact sheet: written ones first, then captions of held-out scenes. Always the same."""
    drawn = scenes.sample(max(0, count - len(WRITTEN)), seed=20_000, split="test")
    return [*WRITTEN, *scenes.captions(drawn, 5)][:count]


def noise(count: int, seed: int, latent: int) -> torch.Tensor:
    """Starting noise for `count` pictures, each its own whatever the batch: (count, N, 64) float32 on the CPU."""
    rows = []
    for i in range(count):
        generator = torch.Generator("cpu").manual_seed(seed * 100_003 + i)
        rows.append(torch.randn((latent // 2) ** 2, 64, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def paint(pipe, texts: list[str], *, steps: int, guidance: float, size: int, length: int,
          seed: int = 7, true_cfg: float = 1.0, batch: int = 64) -> torch.Tensor:  # fmt: skip
    """Pictures (B, 3, size, size) uint8 of a FluxPipeline."""
    out = []
    start = noise(len(texts), seed, size // 8).to(pipe.transformer.dtype)
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        images = pipe(
            prompt=part, negative_prompt=[""] * len(part) if true_cfg > 1 else None, true_cfg_scale=true_cfg,
            num_inference_steps=steps, guidance_scale=guidance, height=size, width=size, max_sequence_length=length,
            latents=start[first : first + batch].to(pipe.device), output_type="pt",
        ).images  # fmt: skip
        out.append((images.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(out)


def sheets(model: Path, out: Path, config: dict, log: Log, device: torch.device, *, base: bool = False) -> None:
    """Write one JPEG a number of steps to `out`. `base`: before distillation, true guidance, middle number."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    texts = prompts(config["count"])
    out.mkdir(parents=True, exist_ok=True)
    steps_list = config["steps"][1:2] if base else config["steps"]
    for steps in steps_list:
        began = time.time()
        kind = {"guidance": 1.0, "true_cfg": config["guidance"]} if base else {"guidance": config["guidance"]}
        drawn = paint(pipe, texts, steps=steps, size=config["size"], length=config["length"], **kind)
        name = f"base_{steps:02d}.jpg" if base else f"steps_{steps:02d}.jpg"
        contact_sheet(drawn, texts, columns=8, cell=config["cell"]).save(out / name, quality=85)
        log("samples", sheet=name, pictures=len(texts), took=round(time.time() - began, 2))
