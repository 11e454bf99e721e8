"""Small damage of the kinds that generated pictures show: tint, blur, lost detail, noise, block artefacts."""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional


def damage(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change pictures (B, 3, H, W) in [0, 1] a little, each in its own way; the result stays in [0, 1]."""
    draw = lambda: torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)  # noqa: E731
    some = lambda share: (draw() < share).float() * draw()  # noqa: E731
    gain = 1 + 0.06 * (2 * torch.rand(len(images), 3, 1, 1, generator=generator, device=images.device) - 1)
    middle = images.mean((1, 2, 3), keepdim=True)
    x = (images - middle) * (1 + 0.16 * (2 * draw() - 1)) + middle + 0.06 * (2 * draw() - 1)
    x = x * gain
    x = torch.lerp(x, _blur(x), some(0.6))
    half = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.lerp(x, half, some(0.4))
    x = blocks(x, 0.25 * some(0.4))
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (x + 0.035 * some(0.6) * noise).clamp(0, 1)


def _blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with a standard deviation of 1.5 pixels."""
    taps = torch.exp(-(torch.linspace(-4, 4, 9, device=x.device, dtype=x.dtype) ** 2) / (2 * 1.5**2))
    kernel = (taps / taps.sum()).repeat(x.shape[1], 1)
    padded = functional.pad(x, (4, 4, 4, 4), mode="reflect")
    across = functional.conv2d(padded, kernel[:, None, None], groups=x.shape[1])
    return functional.conv2d(across, kernel[:, None, :, None], groups=x.shape[1])


@functools.cache
def _cosines() -> torch.Tensor:
    """The orthonormal 8-point discrete cosine transform, rows are frequencies."""
    k = torch.arange(8.0)
    basis = torch.cos((k[None] + 0.5) * k[:, None] * math.pi / 8) * 0.5
    basis[0] *= math.sqrt(0.5)
    return basis


def blocks(x: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """What JPEG does: round the cosine coefficients of 8 x 8 blocks, coarser for finer detail.

    `step` (B, 1, 1, 1) is the rounding step of the finest detail, in units of the picture's range; 0 changes nothing.
    """
    b, c, height, width = x.shape
    basis = _cosines().to(x)
    tiles = x.reshape(b, c, height // 8, 8, width // 8, 8)
    values = torch.einsum("ui,bcyixj,vj->bcyxuv", basis, tiles, basis)
    k = torch.arange(8, device=x.device, dtype=x.dtype)
    steps = (step[..., None, None] * (k[:, None] + k + 2) / 16).clamp(min=1e-4)
    values = (values / steps).round() * steps
    return torch.einsum("ui,bcyxuv,vj->bcyixj", basis, values, basis).reshape(x.shape)
