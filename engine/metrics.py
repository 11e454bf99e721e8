"""How far two pictures of one size are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["psnr"]


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over 8-bit RGB; infinite for equal pictures.

    Raises ArgumentError when the sizes differ.
    """
    if first.size != second.size:
        raise ArgumentError(f"second: expected pictures of one size, got {first.size} and {second.size}")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second))
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
