"""Pictures from line drawings in one step: the pix2pix-turbo form of FLUX (arXiv 2403.12036).

One number, alpha, does two jobs: it is the share of the drawing's latents in the starting noise, and the strength of
the LoRA that taught the transformer to read them. The order of the steps, and of the two draws from the generator, is
that of the published sampler: with the same weights the same seed gives the same noise.

    drawing  resize (Lanczos), below one half is line, erode, lines +1 on -1
    enc      a draw from the autoencoder's posterior of it, shifted and scaled
    noisy    (1 - alpha) z + alpha enc, with z drawn after the posterior
    x_0      noisy - transformer(noisy, timestep 1)

Shape letters: B batch, C latent channels, H and W pixels, h and w latent cells, N = h/2 * w/2 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from engine.errors import ArgumentError, ModelError

__all__ = [
    "ALPHA",
    "GUIDANCE",
    "erosion",
    "mix",
    "one_step",
    "pixels",
    "sketch_to_image",
    "strength_by_peft",
    "to_lines",
]

ALPHA = 0.28
GUIDANCE = 1.0  # what a transformer with a guidance embedding is told; sketch LoRAs are trained at this one value
_CANVAS, _KERNEL = 1024, 4  # the published sampler erodes 1024-pixel canvases with a 4x4 kernel

Drawing = Image.Image | Sequence[Image.Image] | Tensor
Strength = Callable[[float], None]


def erosion(side: int) -> int:
    """Side of the erosion kernel for pictures of `side` pixels: 4 at 1024, 2 at 512, 1 (nothing is eroded) at 256."""
    return max(1, round(_KERNEL * side / _CANVAS))


def to_lines(sketch: Drawing, height: int, width: int) -> Tensor:
    """Dark strokes on a light page as the model reads them: lines +1, page -1, float32 (B, 3, H', W').

    Takes pictures, or a tensor (B, 1 or 3, height, width) in [0, 1]. Only the first channel counts. H' and W' are one
    more than asked where the erosion kernel is even, as the published sampler has it; the autoencoder rounds down.
    Raises ArgumentError for a tensor of another size.
    """
    grey = _grey(sketch, height, width)
    line = (grey < 0.5).float()
    side = erosion(min(height, width))
    if side > 1:
        ones = torch.ones(1, 1, side, side, device=line.device)
        line = (F.conv2d(line, ones, padding=side // 2) > side * side - 0.1).float()
    return line.expand(-1, 3, -1, -1) * 2 - 1


def _grey(sketch: Any, height: int, width: int) -> Tensor:
    """First channel of the drawings, (B, 1, height, width) in [0, 1]."""
    if isinstance(sketch, Tensor):
        if sketch.ndim != 4 or sketch.shape[-2:] != (height, width):
            raise ArgumentError(f"sketch: expected a tensor (B, 3, {height}, {width}), got {tuple(sketch.shape)}")
        return sketch[:, :1].float()
    pictures = [sketch] if isinstance(sketch, Image.Image) else list(sketch)
    resized = [p.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for p in pictures]
    return torch.stack([torch.from_numpy(np.asarray(p)[None, ..., 0].copy()) for p in resized]).float() / 255


def strength_by_peft(pipe: Any) -> Strength:
    """Setter of the strength of every LoRA that `load_lora_weights` put into the pipeline's transformer.

    Raises ModelError when there is none.
    """
    names = pipe.get_list_adapters().get("transformer", [])
    if not names:
        raise ModelError("the pipeline has no LoRA; load a sketch LoRA with load_lora_weights first")
    return lambda alpha: pipe.set_adapters(names, [alpha] * len(names))


@torch.inference_mode()
def sketch_to_image(
    pipe: Any,
    sketch: Drawing,
    prompt: str | Sequence[str],
    alpha: float = ALPHA,
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    height: int = 256,
    width: int = 256,
    guidance: float = GUIDANCE,
    max_sequence_length: int = 512,
    strength: Strength | None = None,
    output_type: str = "pil",
) -> Any:
    """Paint drawings in one step with a FluxPipeline that carries a sketch LoRA.

    sketch: pictures, or a tensor (B, 3, height, width) in [0, 1], dark lines on a light page; one prompt a drawing.
    alpha: 0 ignores the drawing and the LoRA, 1 leaves no noise; 0.2 to 0.5 is usual.
    generator: of the CPU, so that the noise is the same on any device; or one a drawing.
    strength: sets the LoRA's strength; PEFT's is used when left out. Whoever quantizes the transformer gives its own.
    Returns what the pipeline's image processor makes of `output_type` ("pil": a list; "pt": (B, 3, H, W) in [0, 1]).
    Raises ArgumentError for an alpha outside [0, 1], a size that is no multiple of 16 or a wrong number of prompts.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ArgumentError(f"alpha: expected 0 to 1, got {alpha}")
    if height % 16 or width % 16:
        raise ArgumentError(f"height and width: expected multiples of 16, got {height} and {width}")
    lines = to_lines(sketch, height, width)
    prompts = [prompt] * len(lines) if isinstance(prompt, str) else list(prompt)
    if len(prompts) != len(lines):
        raise ArgumentError(f"prompt: expected one for each of {len(lines)} drawings, got {len(prompts)}")
    (strength or strength_by_peft(pipe))(alpha)
    device = pipe._execution_device
    states, pooled, text_ids = pipe.encode_prompt(
        prompt=prompts, prompt_2=None, device=device, max_sequence_length=max_sequence_length
    )
    noisy = mix(pipe, lines.to(device), alpha, generator)
    x0 = one_step(pipe, noisy, states, pooled, text_ids, guidance)
    return pipe.image_processor.postprocess(pixels(pipe, x0, height, width), output_type=output_type)


def mix(pipe: Any, lines: Tensor, alpha: float, generator: Any) -> Tensor:
    """Lines (B, 3, H, W) in [-1, 1] to the noise to start from (B, C, h, w): alpha of their latents in it."""
    config = pipe.vae.config
    drawn = pipe.vae.encode(lines.to(pipe.vae.dtype)).latent_dist.sample(generator)
    encoded = (drawn - config.shift_factor) * config.scaling_factor
    z = randn_tensor(encoded.shape, generator=generator, device=lines.device, dtype=pipe.transformer.dtype)
    return (1 - alpha) * z + alpha * encoded


def one_step(pipe: Any, noisy: Tensor, states: Tensor, pooled: Tensor, text_ids: Tensor, guidance: float) -> Tensor:
    """Packed latents (B, N, 4C) of the picture: sigma goes from 1 to 0 in one stride."""
    batch, channels, h, w = noisy.shape
    dtype = pipe.transformer.dtype
    x = pipe._pack_latents(noisy, batch, channels, h, w).to(dtype)
    told = torch.full((batch,), guidance, device=x.device) if pipe.transformer.config.guidance_embeds else None
    velocity = pipe.transformer(
        hidden_states=x,
        timestep=torch.ones(batch, device=x.device, dtype=dtype),
        guidance=told,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=pipe._prepare_latent_image_ids(batch, h // 2, w // 2, x.device, dtype),
        return_dict=False,
    )[0]
    return x.float() - velocity.float()


def pixels(pipe: Any, packed: Tensor, height: int, width: int) -> Tensor:
    """Packed latents to pictures (B, 3, height, width) about [-1, 1], float32."""
    latents = pipe._unpack_latents(packed, height, width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()
