"""Control maps of rendered scenes, as the apps' preprocessors make them from pictures: edges and inverse depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from zoo.scenes import Rendered
from zoo.train.edges import canny

THRESHOLDS = (100.0, 200.0)  # what the app starts with


def inverse_depth(depth: torch.Tensor) -> torch.Tensor:
    """Metres (B, H, W) to 1 / metres, brought to [0, 1] in each picture: the nearest point is 1. float32."""
    inverse = 1 / depth.float().clamp(min=1e-3)
    return stretch(inverse)


def stretch(values: torch.Tensor) -> torch.Tensor:
    """Each picture's values (B, H, W) moved and scaled to [0, 1]; a flat picture becomes 0."""
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return (values - low) / (high - low).clamp(min=1e-6)


def to_bytes(values: torch.Tensor) -> torch.Tensor:
    """[0, 1] to uint8."""
    return (values * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def canny_maps(drawn: Rendered, generator: torch.Generator) -> torch.Tensor:
    """Edges at the app's thresholds and at others drawn for each picture: (B, 2, H, W) uint8, white on black."""
    n, device = len(drawn.image), drawn.image.device
    low = 40 + 90 * torch.rand(n, generator=generator, device=device)
    high = low * (1.6 + 1.6 * torch.rand(n, generator=generator, device=device))
    both = canny(drawn.image, *THRESHOLDS), canny(drawn.image, low, high)
    return torch.stack(both, 1).to(torch.uint8) * 255


def depth_maps(drawn: Rendered, generator: torch.Generator) -> torch.Tensor:
    """The exact map, and one such as an estimator gives, coarser and bent: (B, 2, H, W) uint8, near is bright."""
    exact = inverse_depth(drawn.depth)
    return torch.stack([to_bytes(exact), to_bytes(_estimated(exact, generator))], 1)


def _estimated(exact: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    n, side, device = len(exact), exact.shape[-1], exact.device
    draw = lambda low, high: low + (high - low) * torch.rand(n, 1, 1, generator=generator, device=device)  # noqa: E731
    bent = exact.clamp(min=1e-4) ** torch.exp(draw(-0.4, 0.4))
    coarse = F.interpolate(F.avg_pool2d(bent[:, None], 4), (side, side), mode="bilinear").squeeze(1)
    soft = torch.lerp(bent, F.avg_pool2d(bent[:, None], 3, 1, 1, count_include_pad=False).squeeze(1), draw(0, 1))
    mixed = torch.where(draw(0, 1) < 0.5, soft, torch.lerp(soft, coarse, draw(0, 0.8)))
    wave = torch.randn(n, 1, 4, 4, generator=generator, device=device)
    wave = F.interpolate(wave, (side, side), mode="bicubic").squeeze(1)
    return stretch(mixed + 0.02 * wave * draw(0, 1))


MAPS = {"canny": canny_maps, "depth": depth_maps}


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of each pair of maps: two (B, H, W) -> (B,); equal values share their ranks."""
    x, y = (_ranks(values.flatten(1).double()) for values in (a, b))
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return ((x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt().clamp(min=1e-12)).float()


def _ranks(values: torch.Tensor) -> torch.Tensor:
    order = values.sort(1).values.contiguous()
    first, last = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (first + last - 1).double() / 2
