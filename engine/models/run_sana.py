"""Make pictures with SANA pipelines, stage by stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from engine.models.sana import PerturbedAttention

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec
    from engine.request import Request

__all__ = ["decode", "denoise", "encode", "settle"]

_TEXT_INPUTS = ("negative_prompt", "clean_caption", "complex_human_instruction")


def settle(pipe: Any, spec: ModelSpec, device: torch.device, share: Any | None) -> None:
    """Choose the layer that perturbed attention acts on: 2/5 of the way in, which is layer 8 of 20."""
    if hasattr(pipe, "set_pag_applied_layers"):
        layer = 2 * len(pipe.transformer.transformer_blocks) // 5
        pipe.set_pag_applied_layers(f"transformer_blocks.{layer}", (PerturbedAttention(3), PerturbedAttention(2)))


def encode(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> dict[str, torch.Tensor]:
    """Text embeddings and masks, by the pipeline's own argument names.

    `request.inputs` may hold `negative_prompt`, `clean_caption` and `complex_human_instruction`.
    """
    default = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    settings = {"complex_human_instruction": default, **_part(request, _TEXT_INPUTS, True)}
    guided = (request.guidance or 0.0) > 1.0
    embeds, mask, negative, negative_mask = pipe.encode_prompt(
        request.prompt,
        do_classifier_free_guidance=guided,
        device=device,
        max_sequence_length=spec.max_sequence_length,
        **settings,
    )
    text = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    if guided:
        text |= {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
    return text


def denoise(
    pipe: Any, spec: ModelSpec, request: Request, text: Mapping[str, torch.Tensor], after_step: Callable[..., Any]
) -> torch.Tensor:
    """Latents (1, C, height/32, width/32). Sizes are true: no resolution bins, no resizing afterwards.

    With SanaPAGPipeline, `request.inputs["pag_scale"]` is the strength of perturbed attention (default 0: none).
    """
    inputs = _part(request, _TEXT_INPUTS, False)
    if "pag_scale" in inspect.signature(type(pipe).__call__).parameters:
        inputs = {"pag_scale": 0.0, **inputs}
    return pipe(
        **text,
        **inputs,
        negative_prompt=None,
        height=request.height,
        width=request.width,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        max_sequence_length=spec.max_sequence_length,
        use_resolution_binning=False,
        output_type="latent",
        callback_on_step_end=after_step,
    ).images


def decode(pipe: Any, latents: torch.Tensor, request: Request) -> Any:
    """The picture (PIL) of latents."""
    latents = latents / pipe.vae.config.scaling_factor
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]


def _part(request: Request, names: tuple[str, ...], wanted: bool) -> dict[str, Any]:
    return {name: value for name, value in request.inputs.items() if (name in names) == wanted}
