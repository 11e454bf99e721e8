"""Distances between pictures, against values that are known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engine.errors import ArgumentError
from engine.metrics import psnr, ssim


def picture(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 52, 3))


def test_equal_pictures_have_ssim_one(noise: np.ndarray):
    assert ssim(picture(noise), picture(noise)) == pytest.approx(1.0)


def test_flat_pictures_follow_the_luminance_term():
    dark, light = np.full((16, 16, 3), 50), np.full((16, 16, 3), 100)
    c1 = (0.01 * 255) ** 2
    assert ssim(picture(dark), picture(light)) == pytest.approx((2 * 50 * 100 + c1) / (50**2 + 100**2 + c1), rel=1e-6)


def test_ssim_is_symmetric_and_falls_with_noise(noise: np.ndarray):
    generator = np.random.default_rng(1)
    some = np.clip(noise + generator.integers(-20, 21, noise.shape), 0, 255)
    more = np.clip(noise + generator.integers(-90, 91, noise.shape), 0, 255)
    a, b, c = map(picture, (noise, some, more))
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert 1 > ssim(a, b) > ssim(a, c) > 0
    assert psnr(a, b) > psnr(a, c)


def test_ssim_is_that_of_the_paper(noise: np.ndarray):
    # One window, written out from the definition: an 11 x 11 picture has exactly one.
    a, b = noise[:11, :11], noise[11:22, :11]
    taps = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(taps, taps)[..., None] / np.outer(taps, taps).sum()
    mean_a, mean_b = (window * a).sum((0, 1)), (window * b).sum((0, 1))
    var_a, var_b = (window * (a - mean_a) ** 2).sum((0, 1)), (window * (b - mean_b) ** 2).sum((0, 1))
    both = (window * (a - mean_a) * (b - mean_b)).sum((0, 1))
    c1, c2 = 2.55**2, 7.65**2
    wanted = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert ssim(picture(a), picture(b)) == pytest.approx(wanted.mean())


def test_pictures_that_do_not_fit_are_refused(noise: np.ndarray):
    with pytest.raises(ArgumentError, match="one size"):
        ssim(picture(noise), picture(noise[:-1]))
    with pytest.raises(ArgumentError, match="at least 11 pixels"):
        ssim(picture(noise[:5]), picture(noise[:5]))
