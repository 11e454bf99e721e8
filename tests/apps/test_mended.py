"""Faults of Gradio that would be ours in a visitor's eyes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from gradio import image_utils, processing_utils
from PIL import Image
from starlette.requests import ClientDisconnect

from apps.common import mended


@pytest.fixture(autouse=True)
def mend() -> None:
    mended.mend()


def noise(side: int = 400) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def test_a_picture_that_is_written_again_is_whole_for_whoever_reads_it(tmp_path):
    def save() -> str:
        return image_utils.format_image(picture, "filepath", str(tmp_path), name="image", format="png")

    picture, wrong = noise(), []
    path, done = save(), threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                with Image.open(path) as found:
                    found.load()
            except (OSError, SyntaxError) as error:
                wrong.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        assert save() == path
    done.set()
    reader.join()
    assert wrong == []
    with Image.open(path) as found:
        assert (np.asarray(found) == np.asarray(picture)).all()
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["image.png"]


def test_a_picture_lies_where_gradio_would_put_it(tmp_path):
    picture = noise(16)
    path = mended.save_whole(picture, str(tmp_path), "photo", "png")
    data = processing_utils.encode_pil_to_bytes(picture, "png")
    assert path == str((tmp_path / processing_utils.hash_bytes(data) / "photo.png").resolve())
    (tmp_path / "ordinary").touch()
    assert Path(path).stat().st_mode == (tmp_path / "ordinary").stat().st_mode, "another user's web server can read it"


@pytest.mark.parametrize(("error", "told"), [(ClientDisconnect(), False), (ValueError("wrong"), True), (None, True)])
def test_only_a_browser_that_left_is_not_told(caplog, error, told):
    logger = logging.getLogger("uvicorn.error")
    with caplog.at_level(logging.ERROR, "uvicorn.error"):
        logger.error("Exception in ASGI application", exc_info=error)
    assert bool(caplog.records) == told
