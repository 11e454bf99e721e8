"""PNG files: settings go in and come out, and their number is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from apps.common import pictures
from engine import Request
from engine.models import catalogue
from tests.apps.fake import FakeEngine

ENGINE = FakeEngine(catalogue.resolve("tiny"), "int4")


@pytest.fixture
def kept():
    made = pictures.Pictures("flux_t2i", limit=3)
    yield made
    made.close()
    assert not made.folder.exists()


def result(seed: int = 7, prompt: str = "ein großer roter Würfel · 立方体"):
    return ENGINE.run(Request(prompt, seed=seed, steps=2, width=128, height=144))


def test_settings_go_into_the_png_and_come_back(kept):
    path = kept.save(result())
    assert Path(path).name == "flux_t2i-7-int4.png"
    settings = pictures.recall(path)
    assert settings["prompt"] == "ein großer roter Würfel · 立方体"
    assert (settings["seed"], settings["steps"], settings["width"], settings["height"]) == (7, 2, 128, 144)
    assert (settings["model"], settings["precision"]) == ("tiny", "int4")


def test_only_the_newest_pictures_stay(kept):
    paths = [Path(kept.save(result(seed))) for seed in range(5)]
    assert [path.exists() for path in paths] == [False, False, True, True, True]


def test_the_difference_map_is_a_png(kept):
    with Image.open(kept.save_map(Image.new("RGB", (4, 4)))) as image:
        assert image.format == "PNG"


def test_a_picture_of_somebody_else_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    with pytest.raises(pictures.NotOurs, match="carries no Nibble Studio settings"):
        pictures.recall(tmp_path / "plain.png")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(pictures.NotOurs, match="could not be read"):
        pictures.recall(tmp_path / "broken.png")
