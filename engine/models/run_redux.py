"""Make pictures from pictures with FLUX.1 Redux, stage by stage.

A prior reads each picture with a vision tower and speaks of it in the transformer's own terms: its words follow the
prompt's. What a request gives in `inputs`:

    images            pictures (PIL), at least one
    weights           how much each counts, 0 or more; they are brought to a sum of 1 (default: alike)
    image_strength    factor of the pictures' words, 0 to 1 (default 1, as in FluxPriorReduxPipeline)
    prompt_strength   factor of the prompt's words (default 1)

Shapes: L text tokens, P picture tokens, D the transformer's joint_attention_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from engine.errors import RequestError
from engine.models import run_flux
from engine.models.run_flux import decode

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec
    from engine.request import Request

__all__ = ["decode", "denoise", "encode", "settle"]


def settle(pipe: Any, spec: ModelSpec, device: torch.device, share: Any | None) -> None:
    """Open the prior, without text encoders of its own; or use the one of `share`."""
    if share is not None:
        pipe.prior, pipe.prior_reads_text = share.prior, share.prior_reads_text
        return
    from diffusers import FluxPriorReduxPipeline

    listed: dict[str, Any] = FluxPriorReduxPipeline.load_config(spec.prior)  # pyright: ignore[reportAssignmentType]
    # The published prior has no text encoders, and then stands zeros where an empty prompt would be.
    pipe.prior_reads_text = bool(listed.get("text_encoder", [None])[0])
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe.prior = FluxPriorReduxPipeline.from_pretrained(spec.prior, dtype=pipe.transformer.dtype, **none)
    for part in (pipe.prior.image_encoder, pipe.prior.image_embedder):
        part.to(device).eval().requires_grad_(False)


def encode(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> dict[str, torch.Tensor]:
    """Embeddings (1, L + P, D) of the prompt and of the mixed pictures, by the pipeline's own argument names.

    Raises RequestError where a picture or its weight is missing.
    """
    images = request.inputs.get("images") or ()
    shares = _shares(request.inputs.get("weights") or [1.0] * len(images), len(images))
    text, pooled = _text(pipe, spec, request, device)
    seen = [_words(pipe.prior, image, device) for image in images]
    mixed = sum(share * words for share, words in zip(shares, seen, strict=True))
    strength = _factor(request, "image_strength", 1.0)
    said = _factor(request, "prompt_strength", 10.0) if request.prompt.strip() else 1.0
    embeds = torch.cat([said * text, strength * mixed.to(text.dtype)], 1)  # pyright: ignore[reportAttributeAccessIssue]
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": said * pooled}


def denoise(
    pipe: Any, spec: ModelSpec, request: Request, text: Mapping[str, torch.Tensor], after_step: Callable[..., Any]
) -> torch.Tensor:
    """Packed latents (1, N, 64)."""
    return run_flux.denoise(pipe, spec, replace(request, inputs={}), text, after_step)


def _text(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if request.prompt.strip() or pipe.prior_reads_text:
        found = run_flux.encode(pipe, spec, request, device)
        return found["prompt_embeds"], found["pooled_prompt_embeds"]
    config, dtype = pipe.transformer.config, pipe.transformer.dtype
    empty = torch.zeros(1, spec.max_sequence_length, config.joint_attention_dim, dtype=dtype, device=device)
    return empty, torch.zeros(1, config.pooled_projection_dim, dtype=dtype, device=device)


def _words(prior: Any, image: Any, device: torch.device) -> torch.Tensor:
    """What the prior says of a picture, (1, P, D)."""
    return prior.image_embedder(prior.encode_image(image, device, 1)).image_embeds


def _shares(weights: Any, count: int) -> list[float]:
    if count == 0:
        raise RequestError("images", "images: expected at least one picture, got none")
    good = len(weights) == count and all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights)
    if not good or not sum(weights):
        raise RequestError(
            "weights",
            f"weights: expected {count} numbers, 0 or more, not all of them 0, got {list(weights)!r}",
        )
    return [weight / sum(weights) for weight in weights]


def _factor(request: Request, name: str, high: float) -> float:
    value = request.inputs.get(name, 1.0)
    if not isinstance(value, int | float) or not 0 <= value <= high:
        raise RequestError(name, f"{name}: expected a number from 0 to {high:g}, got {value!r}")
    return float(value)
