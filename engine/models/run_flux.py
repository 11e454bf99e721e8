"""Make pictures with FLUX pipelines, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec
    from engine.request import Request

__all__ = ["decode", "denoise", "encode", "settle"]


def settle(pipe: Any, spec: ModelSpec, device: torch.device, share: Any | None) -> None:
    """Nothing to set up in a FLUX pipeline."""


def encode(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> dict[str, torch.Tensor]:
    """Text embeddings of the prompt, by the pipeline's own argument names."""
    embeds, pooled, _ = pipe.encode_prompt(
        prompt=request.prompt, prompt_2=None, device=device, max_sequence_length=spec.max_sequence_length
    )
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}


def denoise(
    pipe: Any, spec: ModelSpec, request: Request, text: Mapping[str, torch.Tensor], after_step: Callable[..., Any]
) -> torch.Tensor:
    """Packed latents (1, N, 64)."""
    return pipe(
        **text,
        **request.inputs,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=spec.max_sequence_length,
        output_type="latent",
        callback_on_step_end=after_step,
    ).images


def decode(pipe: Any, latents: torch.Tensor, request: Request) -> Any:
    """The picture (PIL) of packed latents."""
    config = pipe.vae.config
    latents = pipe._unpack_latents(latents, request.height, request.width, pipe.vae_scale_factor)
    latents = latents / config.scaling_factor + config.shift_factor
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]
