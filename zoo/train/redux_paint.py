"""Variations and mixes through the unmodified pipelines: FluxPriorReduxPipeline, then FluxPipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from zoo.train.samples import noise


def pil(pictures: torch.Tensor) -> list[Image.Image]:
    """uint8 pictures (B, 3, H, W) as PIL's."""
    return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pictures]


@torch.no_grad()
def embed(
    prior: Any,
    groups: Sequence[Sequence[Image.Image]],
    weights: Sequence[Sequence[float]],
    text_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (G, L + P, D) and pooled (G, E) of groups of pictures, each mixed by its weights.

    The prior pads its empty prompt to 512 tokens by itself. With `text_length` it is given one of that length, which
    costs the transformer less.
    """
    states, pooled = [], []
    short = None
    if text_length:
        short = prior.encode_prompt("", device=prior._execution_device, max_sequence_length=text_length)[:2]
    for pictures, shares in zip(groups, weights, strict=True):
        n, shares = len(pictures), [float(s) for s in shares]
        said: dict[str, Any] = {"prompt": ""}
        if short:  # copies: the pipeline scales what it is given in place
            said = {"prompt_embeds": short[0].repeat(n, 1, 1), "pooled_prompt_embeds": short[1].repeat(n, 1)}
        out = prior(list(pictures), **said, prompt_embeds_scale=shares, pooled_prompt_embeds_scale=shares)
        states.append(out.prompt_embeds)
        pooled.append(out.pooled_prompt_embeds)
    return torch.cat(states), torch.cat(pooled)


@torch.no_grad()
def paint(
    pipe: Any,
    states: torch.Tensor,
    pooled: torch.Tensor,
    *,
    steps: int,
    guidance: float,
    size: int,
    seed: int = 7,
    batch: int = 64,
) -> torch.Tensor:
    """Pictures (G, 3, size, size) uint8 of embeddings; picture i starts from noise of its own, whatever the batch."""
    start, dtype = noise(len(states), seed, size // 8), pipe.transformer.dtype
    out = []
    for first in range(0, len(states), batch):
        rows = slice(first, first + batch)
        latents = pipe(
            prompt_embeds=states[rows].to(dtype),
            pooled_prompt_embeds=pooled[rows].to(dtype),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=size,
            width=size,
            latents=start[rows].to(pipe._execution_device, dtype),
            output_type="latent",
        ).images
        # Decoded here, in the autoencoder's own precision: the pipeline would decode in the transformer's.
        latents = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()
        out.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(out)
