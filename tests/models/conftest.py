"""A real FLUX transformer of the smallest shape the 4-bit layout takes, with random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel

CONFIG = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}


def small_flux(seed: int = 0) -> FluxTransformer2DModel:
    """Random weights of a size that training would give: activations neither vanish nor explode."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def flux_inputs(tokens: int = 16, text: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(tokens, 3)
    ids[:, 1] = torch.arange(tokens) // 4
    ids[:, 2] = torch.arange(tokens) % 4
    return {
        "hidden_states": torch.randn(1, tokens, 16, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, text, 64, generator=generator).bfloat16(),
        "pooled_projections": torch.randn(1, 32, generator=generator).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([3.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


@pytest.fixture
def flux_model() -> FluxTransformer2DModel:
    return small_flux()
