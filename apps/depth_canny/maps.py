"""Control maps from pictures: edges by OpenCV's Canny, depth by a depth-estimation model of transformers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from PIL import Image

__all__ = ["depth", "edges", "reduced"]


def reduced(picture: Image.Image, share: float) -> Image.Image:
    """The picture at that share, above 0, of its width and height, at least 16 pixels; the same at 1."""
    across, down = (max(round(side * share), min(side, 16)) for side in picture.size)
    return picture.resize((across, down), Image.Resampling.LANCZOS)


def edges(picture: Image.Image, low: float, high: float) -> Image.Image:
    """White edges on black, at the picture's own size. `low` and `high` are Canny's thresholds, 0 to 255."""
    lines = cv2.Canny(np.asarray(picture), low, high)
    return Image.fromarray(lines).convert("RGB")


def depth(picture: Image.Image, model: str) -> Image.Image:
    """Inverse depth, near is bright, at the picture's own size; `model` is a folder or hub id of an estimator."""
    import torch

    processor, network = _estimator(model)
    with torch.inference_mode():
        found = network(**processor(picture, return_tensors="pt")).predicted_depth[0].float().numpy()
    span = float(found.max() - found.min())
    flat = (found - found.min()) / span if span > 1e-6 else np.zeros_like(found)
    near = Image.fromarray((255 * flat + 0.5).astype(np.uint8))
    return near.resize(picture.size, Image.Resampling.BICUBIC).convert("RGB")


@lru_cache(maxsize=1)
def _estimator(model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    from engine.models.loading import LOADING

    with LOADING:
        return AutoImageProcessor.from_pretrained(model), AutoModelForDepthEstimation.from_pretrained(model).eval()
