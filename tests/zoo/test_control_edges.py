"""The torch edge detector against OpenCV's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo import scenes
from zoo.train.edges import canny

cv2 = pytest.importorskip("cv2", reason="the comparison needs OpenCV")


def rendered(count: int, size: int) -> torch.Tensor:
    return scenes.render(scenes.sample(count, seed=5), size=size, oversample=1).image


def by_opencv(images: torch.Tensor, low: float, high: float) -> np.ndarray:
    return np.stack([cv2.Canny(np.ascontiguousarray(i.permute(1, 2, 0).numpy()), low, high) > 0 for i in images])


@pytest.mark.parametrize("thresholds", [(50, 100), (50, 200), (100, 200), (20.7, 60.2)])
def test_equals_opencv_on_renders(thresholds):
    images = rendered(2, 128)
    ours, theirs = canny(images, *thresholds).numpy(), by_opencv(images, *thresholds)
    assert theirs.any()
    assert (ours == theirs).mean() >= 0.9999
    assert (ours & theirs).sum() >= 0.995 * max(ours.sum(), theirs.sum())


@pytest.mark.parametrize("channels", [1, 3])
def test_equals_opencv_on_noise(channels):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, channels, 61, 83), generator=generator, dtype=torch.uint8)
    np.testing.assert_array_equal(canny(images, 300, 600).numpy(), by_opencv(images, 300, 600))


def test_thresholds_may_differ_by_picture():
    images = rendered(2, 96)
    both = canny(images, torch.tensor([30.0, 100.0]), torch.tensor([90.0, 200.0]))
    assert torch.equal(both[0], canny(images[:1], 30, 90)[0])
    assert torch.equal(both[1], canny(images[1:], 100, 200)[0])


def test_other_types_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        canny(torch.zeros(1, 3, 8, 8), 1, 2)
