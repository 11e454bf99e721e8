"""How two pictures of the same noise differ: a map to look at and two numbers, three where LPIPS is at hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from engine import EngineError
from engine.metrics import load_lpips, psnr

__all__ = ["Scores", "colour_map", "difference_map", "perceptual", "psnr", "scores", "ssim"]

log = logging.getLogger("nibble")

# Anchors of a dark-to-light map whose lightness rises evenly, so that twice as bright reads as twice as different.
_ANCHORS = np.array(
    [
        [11, 12, 18], [30, 28, 66], [54, 42, 112], [92, 48, 138], [136, 55, 139],
        [180, 66, 122], [218, 88, 92], [242, 125, 62], [250, 174, 52], [250, 220, 110], [255, 250, 214],
    ],
    dtype=np.float64,
)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """PSNR in dB (infinite for equal pictures) and SSIM (1 for equal pictures)."""

    psnr: float
    ssim: float


def scores(a: Image.Image, b: Image.Image) -> Scores:
    """Compare two pictures of one size; ValueError when the sizes differ."""
    return Scores(psnr(a, b), ssim(a, b))


@cache
def perceptual() -> Callable[[Image.Image, Image.Image], float] | None:
    """LPIPS on the CPU, 0 for equal pictures; None where its libraries or AlexNet's weights are not on this machine.

    Nothing is fetched: the weights are looked for where torch keeps its downloads.
    """
    if find_spec("torchmetrics") is None or find_spec("torchvision") is None:
        return None
    import torch

    try:
        from torchvision.models import AlexNet_Weights  # pyright: ignore[reportMissingImports]

        file = AlexNet_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
        return load_lpips("cpu") if (Path(torch.hub.get_dir()) / "checkpoints" / file).is_file() else None
    except (EngineError, ImportError, OSError, RuntimeError) as error:
        # A torchvision made for another torch breaks at its import.
        log.warning("LPIPS is left out: %s", error)
        return None


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of the luma, Wang et al. 2004: Gaussian window of 11, sigma 1.5, K = 0.01 and 0.03."""
    x, y = (_luma(picture) for picture in _pair(a, b))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float(np.mean(luminance * structure))


def difference_map(a: Image.Image, b: Image.Image, amplification: float = 8.0) -> Image.Image:
    """Colour each pixel by its mean absolute channel difference times `amplification` (saturates at 255)."""
    x, y = _pair(a, b)
    difference = np.abs(x - y).mean(axis=2) * amplification
    return Image.fromarray(colour_map()[np.clip(np.rint(difference), 0, 255).astype(np.uint8)])


def colour_map() -> np.ndarray:
    """The 256 colours of the difference map, uint8 (256, 3), from no difference to saturation."""
    positions = np.linspace(0, 1, len(_ANCHORS))
    along = np.linspace(0, 1, 256)
    channels = [np.interp(along, positions, _ANCHORS[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def _pair(a: Image.Image, b: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    if a.size != b.size:
        raise ValueError(f"expected two pictures of one size, got {a.size} and {b.size}")
    return tuple(np.asarray(picture.convert("RGB"), dtype=np.float64) for picture in (a, b))  # pyright: ignore


def _luma(x: np.ndarray) -> np.ndarray:
    return x @ np.array([0.299, 0.587, 0.114])


def _blur(x: np.ndarray) -> np.ndarray:
    """Gaussian blur where the window fits whole; a picture smaller than the window gets a smaller window."""
    for axis in (0, 1):
        radius = min(5, (x.shape[axis] - 1) // 2)
        weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * 1.5**2))
        windows = np.lib.stride_tricks.sliding_window_view(x, 2 * radius + 1, axis=axis)
        x = windows @ (weights / weights.sum())
    return x
