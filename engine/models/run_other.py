"""Make pictures with a pipeline that this engine knows nothing of: its own call does everything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec
    from engine.request import Request

__all__ = ["decode", "denoise", "encode", "settle"]


def settle(pipe: Any, spec: ModelSpec, device: torch.device, share: Any | None) -> None:
    """Nothing is known that could be set up."""


def encode(pipe: Any, spec: ModelSpec, request: Request, device: torch.device) -> dict[str, torch.Tensor]:
    """Nothing: the call reads the prompt itself."""
    return {}


def denoise(
    pipe: Any, spec: ModelSpec, request: Request, text: Mapping[str, torch.Tensor], after_step: Callable[..., Any]
) -> Any:
    """The picture (PIL), made by the pipeline with those of the request's fields that it takes."""
    asked = {
        **request.inputs,
        "prompt": request.prompt,
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "max_sequence_length": spec.max_sequence_length,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "callback_on_step_end": after_step,
        "use_resolution_binning": False,
    }
    takes = inspect.signature(type(pipe).__call__).parameters
    known = {name: value for name, value in asked.items() if name in takes and value is not None}
    return pipe(**known).images[0]


def decode(pipe: Any, latents: Any, request: Request) -> Any:
    """The picture is one already."""
    return latents
