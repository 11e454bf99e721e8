"""How far two pictures of one size are apart."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from engine.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["load_lpips", "psnr", "ssim"]

# The window and constants of the paper that defined SSIM (Wang et al., 2004).
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(first: Image.Image, second: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB over 8-bit RGB; infinite for equal pictures.

    Raises ArgumentError when the sizes differ.
    """
    a, b = _pixels(first, second)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(first: Image.Image, second: Image.Image) -> float:
    """Structural similarity over 8-bit RGB, 1 for equal pictures: Gaussian window of 11 pixels, mean of all channels.

    Raises ArgumentError when the sizes differ or a side is shorter than the window.
    """
    if min(first.size) < _WINDOW:
        raise ArgumentError(f"first: expected at least {_WINDOW} pixels a side, got {first.size}")
    a, b = _pixels(first, second)
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a**2, _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return float(np.mean(luminance * (2 * covariance + _C2) / (var_a + var_b + _C2)))


def load_lpips(device: str = "cpu") -> Callable[[Image.Image, Image.Image], float]:
    """The learned perceptual distance of two pictures of one size (LPIPS, AlexNet), 0 for equal ones.

    The network's weights are fetched at the first use. Raises BackendError saying what to install or what failed.
    """
    try:
        importlib.import_module("torchvision")
        lpip = importlib.import_module("torchmetrics.image.lpip")
        network = lpip.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    except ImportError as error:
        raise BackendError(f"LPIPS needs torchmetrics and torchvision: pip install both ({error})") from error
    except (OSError, RuntimeError) as error:
        raise BackendError(f"LPIPS: the weights of AlexNet cannot be fetched ({error})") from error
    import torch

    @torch.inference_mode()
    def distance(first: Image.Image, second: Image.Image) -> float:
        pair = [torch.from_numpy(x / 255).permute(2, 0, 1)[None].float().to(device) for x in _pixels(first, second)]
        value = float(network(*pair))
        network.reset()  # the class averages over calls; each pair stands alone here
        return value

    return distance


def _pixels(first: Image.Image, second: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as (H, W, 3) float64."""
    if first.size != second.size:
        raise ArgumentError(f"second: expected pictures of one size, got {first.size} and {second.size}")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second))
    return a, b


def _blurred(values: np.ndarray) -> np.ndarray:
    """Gaussian means of (H, W, 3) where the whole window lies inside: (H - 10, W - 10, 3)."""
    taps = np.exp(-0.5 * ((np.arange(_WINDOW) - _WINDOW // 2) / _SIGMA) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        length = values.shape[axis] - _WINDOW + 1
        values = sum(  # pyright: ignore[reportAssignmentType]
            tap * values.take(range(start, start + length), axis=axis) for start, tap in enumerate(taps)
        )
    return values
