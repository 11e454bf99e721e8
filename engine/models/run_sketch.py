"""Make pictures from line drawings in one step, stage by stage; the method is in engine.models.sketch.

What a request gives in `inputs`: `sketch`, a picture (PIL) with dark lines on a light page, and `alpha`, 0 to 1, the
drawing's share of the noise and the strength of the LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from engine.errors import RequestError
from engine.models import run_flux, sketch
from engine.models.run_flux import decode, settle

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec
    from engine.request import Request

__all__ = ["decode", "denoise", "encode", "settle"]


def encode(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> dict[str, torch.Tensor]:
    """Text embeddings, and `noisy` (1, C, h, w): noise with the drawing's latents in it.

    Raises RequestError where the drawing is missing or alpha is none.
    """
    drawing, alpha = request.inputs.get("sketch"), _alpha(request)
    if not isinstance(drawing, Image.Image):
        raise RequestError("sketch", f"sketch: expected a picture of dark lines on a light page, got {drawing!r:.60}")
    lines = sketch.to_lines(drawing, request.height or 0, request.width or 0).to(device)
    noisy = sketch.mix(pipe, lines, alpha, torch.Generator("cpu").manual_seed(request.seed))
    return {**run_flux.encode(pipe, spec, request, device), "noisy": noisy}


def denoise(
    pipe: Any, spec: ModelSpec, request: Request, text: Mapping[str, torch.Tensor], after_step: Callable[..., Any]
) -> torch.Tensor:
    """Packed latents (1, N, 64), by one call of the transformer."""
    _set_strength(pipe.transformer, spec.name, _alpha(request))
    states, pooled, noisy = text["prompt_embeds"], text["pooled_prompt_embeds"], text["noisy"]
    text_ids = torch.zeros(states.shape[1], 3, device=states.device, dtype=states.dtype)
    latents = sketch.one_step(pipe, noisy, states, pooled, text_ids, sketch.GUIDANCE)
    after_step(pipe, 0, 1.0, {})
    return latents


def _set_strength(transformer: Any, name: str, alpha: float) -> None:
    """Bring the LoRA to `alpha`; 16-bit layers pay for a change with a merge, so none is made without need."""
    from engine.lora import list_loras, set_lora_strength

    if next(lora.strength for lora in list_loras(transformer) if lora.name == name) != alpha:
        set_lora_strength(transformer, name, alpha)


def _alpha(request: Request) -> float:
    alpha = request.inputs.get("alpha", sketch.ALPHA)
    if not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
        raise RequestError("alpha", f"alpha: expected a number from 0 to 1, got {alpha!r}")
    return float(alpha)
