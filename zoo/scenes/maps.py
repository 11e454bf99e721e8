"""Control maps made from rendered scenes: Canny edges, and the outlines and creases of the solids."""

from __future__ import annotations

import numpy as np
import torch

from zoo.scenes.renderer import geometry_maps
from zoo.scenes.scene import Scenes


def canny(images: torch.Tensor, low: int = 100, high: int = 200) -> torch.Tensor:
    """OpenCV's Canny edges of pictures (B, 3, H, W) uint8: (B, H, W) uint8, 255 on an edge, 0 elsewhere."""
    import cv2

    edges = [cv2.Canny(np.ascontiguousarray(i.permute(1, 2, 0).numpy()), low, high) for i in images.cpu()]
    return torch.from_numpy(np.stack(edges)) if edges else torch.zeros(0, *images.shape[2:], dtype=torch.uint8)


def creases(depth: torch.Tensor, mask: torch.Tensor, normal: torch.Tensor, angle: float = 0.85) -> torch.Tensor:
    """Lines that a hand would draw: (B, H, W) bool, true on one side of an outline, a crease or the end of the floor.

    Takes the maps of `geometry_maps`. A line lies where the object changes, or where the normals of neighbouring
    pixels have a cosine below `angle`.
    """
    lines = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (1, 2):
        size = mask.shape[axis] - 1
        a, b = (mask.narrow(axis, k, size) for k in (0, 1))
        turn = (normal.narrow(axis + 1, 0, size) * normal.narrow(axis + 1, 1, size)).sum(1) < angle
        # A line belongs to the nearer of its two pixels, so that it follows the solid's own edge.
        near = depth.narrow(axis, 0, size) <= depth.narrow(axis, 1, size)
        jump = (a != b) | turn
        lines.narrow(axis, 0, size).logical_or_(jump & near)
        lines.narrow(axis, 1, size).logical_or_(jump & ~near)
    return lines


def sketch(scenes: Scenes, size: int = 256, width: int = 2, device: torch.device | str = "cpu") -> torch.Tensor:
    """Line drawings, dark on white, with strokes of about `width` pixels: (B, size, size) uint8."""
    fine = max(1, width)
    lines = creases(*geometry_maps(scenes, size * 2, device)).float()[:, None]
    thick = torch.nn.functional.max_pool2d(lines, 2 * fine - 1, stride=1, padding=fine - 1)
    return (255 * (1 - torch.nn.functional.avg_pool2d(thick, 2)[:, 0])).round().to(torch.uint8)
