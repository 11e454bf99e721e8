"""The comparison's arithmetic, against values worked out another way."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from apps.common import compare, comparison, words


def flat(*colour: int, size=(32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(seed: int, size=(32, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_psnr_of_a_known_error():
    assert compare.psnr(flat(10, 20, 30), flat(20, 30, 40)) == pytest.approx(20 * np.log10(255 / 10))
    assert compare.psnr(noise(1), noise(1)) == float("inf")
    assert words.decibels(float("inf")) == "∞ dB"


def ssim_by_hand(a: Image.Image, b: Image.Image) -> float:
    """The definition, window by window."""
    luma = np.array([0.299, 0.587, 0.114])
    x, y = (np.asarray(picture, dtype=float) @ luma for picture in (a, b))
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            p, q = (z[top : top + 11, left : left + 11] for z in (x, y))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


def test_ssim_is_the_definition():
    a, b = noise(1), noise(2)
    mixed = Image.blend(a, b, 0.3)
    assert compare.ssim(a, a) == pytest.approx(1)
    assert compare.ssim(a, mixed) == pytest.approx(ssim_by_hand(a, mixed), abs=1e-9)
    assert compare.ssim(a, b) < compare.ssim(a, mixed) < 1


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (10, 10)])
def test_small_pictures_have_scores(size):
    assert compare.ssim(noise(1, size), noise(1, size)) == pytest.approx(1)
    assert compare.difference_map(noise(1, size), noise(2, size)).size == size


def test_pictures_of_two_sizes_cannot_be_compared():
    with pytest.raises(ValueError, match="one size"):
        compare.scores(flat(1, 2, 3), flat(1, 2, 3, size=(8, 8)))


def test_the_map_shows_the_mean_difference_amplified():
    colours = compare.colour_map()
    drawn = compare.difference_map(flat(100, 100, 100), flat(103, 106, 109), 4)
    assert drawn.getpixel((0, 0)) == tuple(colours[24])
    assert compare.difference_map(flat(9, 9, 9), flat(9, 9, 9)).getpixel((5, 5)) == tuple(colours[0])
    assert compare.difference_map(flat(0, 0, 0), flat(255, 255, 255)).getpixel((5, 5)) == tuple(colours[255])


def test_the_colours_grow_lighter_all_the_way():
    lightness = compare.colour_map() @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) >= -0.5).all()
    assert lightness[-1] - lightness[0] > 200


def test_the_legend_says_where_the_colours_end():
    assert "255 of 255" in comparison.legend(1)
    assert "32+ of 255" in comparison.legend(8)


@pytest.mark.parametrize(
    ("reference", "this", "said"),
    [(2.0, 1.0, "2.00× faster"), (1.0, 2.0, "2.00× slower"), (1.0, 1.01, "same speed")],
)
def test_speed_is_said_honestly(reference, this, said):
    assert words.faster(reference, this)[0] == said


def test_sizes_in_words():
    assert words.bytes_text(0) == ("0", "B")
    assert words.bytes_text(17_000_000) == ("16.2", "MiB")
    assert words.bytes_text(23.8e9) == ("22.17", "GiB")
    assert words.smaller(8, 2) == ("4.0× smaller", "better")
    assert words.smaller(2, 8) == ("4.0× larger", "worse")
    assert words.seconds_text(0.25) == ("250", "ms")
    assert words.seconds_text(12.345) == ("12.3", "s")


def result(picture: Image.Image, precision: str) -> Any:
    return SimpleNamespace(image=picture, precision=precision)


@pytest.fixture
def forgotten():
    compare.perceptual.cache_clear()
    yield
    compare.perceptual.cache_clear()


def test_lpips_is_not_shown_where_it_is_not_at_hand_and_nothing_is_fetched(monkeypatch, tmp_path, forgotten):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was fetched"))
    assert compare.perceptual() is None
    shots: Any = {p: comparison.Shot("", result(noise(1), p)) for p in ("bf16", "int4")}
    assert comparison.scored(cast(Any, None), shots, "int4") == {}
    assert list(tmp_path.rglob("*.pth")) == []


def test_lpips_stands_beside_the_others_where_it_is_at_hand(monkeypatch):
    asked = []

    def distance(first: Image.Image, second: Image.Image) -> float:
        asked.append((first, second))
        return 0.1234

    monkeypatch.setattr(compare, "perceptual", lambda: distance)
    shots: Any = {p: comparison.Shot("", result(noise(n), p)) for n, p in enumerate(("int4", "bf16"))}
    parts: Any = SimpleNamespace(scores="here")
    shown = comparison.scored(parts, shots, "int4")["here"]
    assert "LPIPS" in shown
    assert "0.123" in shown
    assert asked == [(shots["bf16"].result.image, shots["int4"].result.image)]
    assert comparison.scored(parts, {"bf16": shots["bf16"]}, "int4") == {}
