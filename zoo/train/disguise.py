"""Pictures made to look unlike renders, for a depth estimator that must also read photographs and drawings.

All functions take and give float32 pictures (B, 3, S, S) in [0, 1] on the generator's device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from zoo.train.edges import gradients


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g, device=g.device)


def _sometimes(share: float, changed: torch.Tensor, x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """`changed` in about this share of the pictures, x in the others."""
    return torch.where(_uniform(len(x), 0, 1, g) < share, changed, x)


def move(x: torch.Tensor, depth: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror, crop, stretch and tilt pictures, and depth (B, S, S) metres with them."""
    n = len(x)
    scale, stretch = _uniform(n, 0.55, 1.0, g).flatten(), _uniform(n, 0.85, 1.0, g).flatten()
    tilt = _uniform(n, -0.12, 0.12, g).flatten()
    mirror = torch.where(torch.rand(n, generator=g, device=g.device) < 0.5, -1.0, 1.0)
    shift = (1 - scale)[:, None] * (2 * torch.rand(n, 2, generator=g, device=g.device) - 1)
    cos, sin = scale * tilt.cos(), scale * tilt.sin()
    rows = torch.stack([cos * stretch * mirror, -sin, shift[:, 0], sin * stretch * mirror, cos, shift[:, 1]], 1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(x.shape), align_corners=False)
    picture = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    moved = F.grid_sample(depth[:, None], grid, mode="nearest", padding_mode="reflection", align_corners=False)
    whole = torch.rand(n, generator=g, device=g.device) < 0.3
    pick = whole.view(-1, 1, 1)
    return torch.where(pick[..., None], x, picture), torch.where(pick, depth, moved.squeeze(1))


def recolor(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Other light, contrast and colours; sometimes grey or the negative."""
    n = len(x)
    x = x.clamp(1e-4, 1) ** torch.exp(_uniform(n, -0.6, 0.6, g))
    x = (x - 0.5) * torch.exp(_uniform(n, -0.5, 0.4, g)) + 0.5 + _uniform(n, -0.15, 0.15, g)
    tint = 1 + 0.25 * (2 * torch.rand(n, 3, 1, 1, generator=g, device=g.device) - 1)
    x = _sometimes(0.6, _turn_hue(x * tint, g), x, g)
    x = _sometimes(0.12, x.mean(1, keepdim=True).expand_as(x), x, g)
    return _sometimes(0.04, 1 - x, x, g).clamp(0, 1)


def _turn_hue(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Turn colours about the grey axis by any angle (Rodrigues' formula)."""
    angle = _uniform(len(x), -math.pi, math.pi, g)
    axis = math.sqrt(1 / 3)
    around = axis * torch.stack([x[:, 2] - x[:, 1], x[:, 0] - x[:, 2], x[:, 1] - x[:, 0]], 1)
    grey = x.mean(1, keepdim=True)
    return x * angle.cos() + around * angle.sin() + grey * (1 - angle.cos())


def roughen(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Blur, lower resolution, few colours, noise."""
    n, size = len(x), x.shape[-1]
    x = _sometimes(0.25, F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), x, g)
    x = _sometimes(0.10, F.avg_pool2d(x, 7, 1, 3, count_include_pad=False), x, g)
    small = F.interpolate(F.avg_pool2d(x, 4), (size, size), mode="bilinear")
    x = _sometimes(0.10, small, x, g)
    levels = _uniform(n, 3, 10, g).floor()
    x = _sometimes(0.08, (x * levels).round() / levels, x, g)
    noise = torch.randn(x.shape, generator=g, device=g.device) * _uniform(n, 0, 0.10, g)
    return _sometimes(0.5, x + noise, x, g).clamp(0, 1)


def drawing(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Line drawings: dark lines, thin or thick, on white or pale colours, sometimes white on black."""
    n = len(x)
    size = gradients((x * 255).to(torch.uint8))[2].float()[:, None]
    lines = (size > _uniform(n, 60, 160, g)).float()
    lines = _sometimes(0.5, F.max_pool2d(lines, 3, 1, 1), lines, g)
    paper = torch.lerp(
        torch.ones_like(x), x, _sometimes(0.4, _uniform(n, 0.1, 0.5, g), torch.zeros(n, 1, 1, 1, device=g.device), g)
    )
    drawn = paper * (1 - lines * _uniform(n, 0.6, 1.0, g))
    return _sometimes(0.15, 1 - drawn, drawn, g)


def disguise(x: torch.Tensor, g: torch.Generator, drawings: float = 0.12) -> torch.Tensor:
    """All of it, each in a part of the pictures; one in eight is left as it is."""
    changed = roughen(recolor(x, g), g)
    changed = _sometimes(drawings, drawing(x, g), changed, g)
    return _sometimes(0.875, changed, x, g)
