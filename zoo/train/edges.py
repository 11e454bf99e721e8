"""OpenCV's Canny edge detector in torch, for batches on a GPU.

Follows `cv2.Canny(image, low, high)` (aperture 3, L1 gradient, no blur) step by step in integers, so that maps made
here while training and maps made by OpenCV in an app are the same: Sobel with replicated borders, of the channels the
one with the largest gradient, thinning across the gradient in four directions, hysteresis over eight neighbours.
Source: J. Canny, IEEE PAMI 8(6), 1986; rounding and tie rules from OpenCV's documentation and behaviour.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_TAN_22 = 13573  # tan(22.5 degrees) in 15-bit fixed point
_ROUND = 16  # hysteresis steps between two looks at whether anything still changes


def gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sobel gradients dx, dy and magnitude |dx| + |dy| of uint8 pictures (B, C, H, W): three (B, H, W) int32."""
    x = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
    smooth_y = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    smooth_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dx, dy = smooth_y[..., 2:] - smooth_y[..., :-2], smooth_x[..., 2:, :] - smooth_x[..., :-2, :]
    size = dx.abs() + dy.abs()
    best = size.argmax(1, keepdim=True)  # the first of equals, as OpenCV's strict comparison keeps
    pick = lambda t: t.gather(1, best).squeeze(1).to(torch.int32)  # noqa: E731
    return pick(dx), pick(dy), pick(size)


def _neighbour(size: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Each pixel's neighbour; zero beyond the border. (B, H, W)"""
    h, w = size.shape[-2:]
    return F.pad(size, (1, 1, 1, 1))[..., 1 + down : 1 + down + h, 1 + right : 1 + right + w]


def thin(dx: torch.Tensor, dy: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Whether each pixel is the largest across its edge, (B, H, W) bool."""
    x, y = dx.abs(), dy.abs() << 15
    low = x * _TAN_22
    flat, steep = y < low, y > low + (x << 16)
    opposite = (dx ^ dy) < 0
    n = lambda down, right: _neighbour(size, down, right)  # noqa: E731
    across = (size > n(0, -1)) & (size >= n(0, 1))
    along = (size > n(-1, 0)) & (size >= n(1, 0))
    before = torch.where(opposite, n(-1, 1), n(-1, -1))
    after = torch.where(opposite, n(1, -1), n(1, 1))
    return torch.where(flat, across, torch.where(steep, along, (size > before) & (size > after)))


def canny(images: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor) -> torch.Tensor:
    """Edges of uint8 pictures: (B, C, H, W) -> (B, H, W) bool. `low` and `high` are numbers or (B,) tensors.

    Raises ValueError for pictures that are not uint8.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"canny takes uint8 pictures (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}")
    level = lambda v: torch.as_tensor(v, device=images.device).floor().view(-1, 1, 1)  # noqa: E731
    dx, dy, size = gradients(images)
    largest = thin(dx, dy, size)
    weak, strong = largest & (size > level(low)), largest & (size > level(high))
    return _connect(strong, weak)


def _connect(strong: torch.Tensor, weak: torch.Tensor) -> torch.Tensor:
    """Weak pixels that strong ones reach through weak ones, the strong ones included."""
    kind = torch.float16 if strong.is_cuda else torch.float32
    found, allowed = (strong & weak).to(kind), weak.to(kind)
    reached = -1
    while (now := int(found.sum(dtype=torch.float32))) != reached:
        reached = now
        for _ in range(_ROUND):
            found = F.max_pool2d(found[:, None], 3, 1, 1).squeeze(1) * allowed
    return found > 0


def edge_f1(found: torch.Tensor, wanted: torch.Tensor, tolerance: int = 2) -> torch.Tensor:
    """F1 of edge pixels within `tolerance` pixels (a square neighbourhood): two (B, H, W) bool -> (B,) in [0, 1].

    Two pictures without any edge agree fully.
    """
    near = lambda e: F.max_pool2d(e.float()[:, None], 2 * tolerance + 1, 1, tolerance).squeeze(1) > 0  # noqa: E731
    count = lambda e: e.sum((1, 2)).float()  # noqa: E731
    right, reached = count(found & near(wanted)), count(wanted & near(found))
    precision = torch.where(count(found) > 0, right / count(found).clamp(min=1), (count(wanted) == 0).float())
    recall = torch.where(count(wanted) > 0, reached / count(wanted).clamp(min=1), (count(found) == 0).float())
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
