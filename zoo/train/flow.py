"""Flow matching for FLUX-like models: packing, position ids, noise levels, interpolation, loss.

Convention, that of FLUX and diffusers' FlowMatchEulerDiscreteScheduler: x_s = (1 - s) x_0 + s e with noise e, s from 1
(noise) to 0 (picture); the model predicts v = e - x_0, and a step from s to s' adds (s' - s) v.
Shape letters: B batch, C latent channels, H and W latent size, N = H/2 * W/2 tokens, L text tokens.
"""

from __future__ import annotations

import math

import torch


def pack(latents: torch.Tensor) -> torch.Tensor:
    """2x2 patches to tokens, as FluxPipeline packs: (B, C, H, W) -> (B, N, 4C). H and W must be even."""
    b, c, h, w = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents to pack must have even height and width, got {h}x{w}")
    x = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)  # (B, H/2, W/2, C, 2, 2)
    return x.reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Inverse of `pack`: (B, N, 4C) -> (B, C, height, width), height and width in latent cells."""
    b, n, c4 = tokens.shape
    if n != (height // 2) * (width // 2):
        raise ValueError(f"{n} tokens do not make a {height}x{width} latent")
    x = tokens.view(b, height // 2, width // 2, c4 // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c4 // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Rotary position ids of the packed tokens of a (height, width) latent: (N, 3), rows (0, y, x)."""
    ids = torch.zeros(height // 2, width // 2, 3, device=device)
    ids[..., 1] += torch.arange(height // 2, device=device)[:, None]
    ids[..., 2] += torch.arange(width // 2, device=device)[None, :]
    return ids.reshape(-1, 3)


def shift_sigmas(s: torch.Tensor, mu: float) -> torch.Tensor:
    """The scheduler's exponential time shift: e^mu / (e^mu + 1/s - 1)."""
    e = math.exp(mu)
    return e * s / (1 + (e - 1) * s)


def sample_sigmas(
    n: int, mu: float, generator: torch.Generator, spread: float = 1.0, uniform: float = 0.1, noisy: float = 0.0
) -> torch.Tensor:
    """Noise levels to train at, (n,) float32 in (0, 1) on the generator's device.

    Logit-normal (Esser et al. 2024, arXiv 2403.03206, section 3.1), then shifted as the sampler shifts its schedule.
    A part `uniform` of them is uniform before the shift, so that both ends, where a sampler starts and stops, are seen;
    a part `noisy` is uniform from 0.8 to 1, where a picture's layout is decided.
    """
    device = generator.device
    s = torch.sigmoid(spread * torch.randn(n, generator=generator, device=device))
    flat = torch.rand(n, generator=generator, device=device)
    pick = torch.rand(n, generator=generator, device=device) < uniform
    s = shift_sigmas(torch.where(pick, flat, s), mu)
    if noisy:
        early = torch.rand(n, generator=generator, device=device) < noisy
        s = torch.where(early, 0.8 + 0.2 * torch.rand(n, generator=generator, device=device), s)
    return s.clamp(1e-4, 1.0)


def interpolate(x0: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy tokens and the velocity to predict: ((1-s) x0 + s e, e - x0). x0 and noise (B, N, D), sigmas (B,)."""
    s = sigmas.view(-1, *([1] * (x0.ndim - 1)))
    return torch.lerp(x0, noise, s), noise - x0


def velocity_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in float32, a 0-d tensor."""
    return (prediction.float() - target.float()).square().mean()


def transformer_flops(config: dict, image_tokens: int, text_tokens: int) -> float:
    """Floating-point operations of one picture's forward pass through a FluxTransformer2DModel, adaLN included."""
    d, tokens = config["num_attention_heads"] * config["attention_head_dim"], image_tokens + text_tokens
    layers, singles = config["num_layers"], config["num_single_layers"]
    linear = 12 * d * d * tokens * (layers + singles)
    attention = 2 * tokens * tokens * d * (layers + singles)
    modulation = d * d * (12 * layers + 3 * singles)
    ends = d * (config["in_channels"] * 2 * image_tokens + config["joint_attention_dim"] * text_tokens)
    return 2.0 * (linear + attention + modulation + ends)
