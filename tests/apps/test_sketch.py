"""The sketch app with its true small model: drawings are followed, photos are read, a blank page is said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradio_client import handle_file
from PIL import Image

from apps.sketch import READINGS, drawing
from apps.sketch.run import HERE
from engine import Engine, Request, RequestError
from engine.lora import list_loras
from engine.models import sketch
from tests.apps.conftest import visit

DRAWN = HERE / "cone.png"


@pytest.fixture
def served(small_house):
    return small_house[0], small_house[1]["sketch"]


@pytest.fixture(scope="module")
def painter() -> Engine:
    return Engine.load("tiny-sketch", "bf16", device="cpu")


def page() -> Image.Image:
    return Image.open(DRAWN).convert("RGB")


def test_the_engine_paints_what_the_sampler_paints(painter):
    request = Request("a purple cone", seed=5, inputs={"sketch": page(), "alpha": 0.4})
    ours = np.asarray(painter.run(request).image).astype(int)
    direct = sketch.sketch_to_image(
        painter.pipe, page(), "a purple cone", 0.4, torch.Generator("cpu").manual_seed(5), max_sequence_length=64,
        strength=lambda _: None,
    )[0]  # fmt: skip
    assert np.abs(ours - np.asarray(direct).astype(int)).max() <= 1
    assert [lora.strength for lora in list_loras(painter.pipe.transformer)] == [0.4]


def test_the_slider_goes_back_to_the_very_same_picture(painter):
    paint = lambda alpha: painter.run(  # noqa: E731
        Request("a purple cone", seed=5, inputs={"sketch": page(), "alpha": alpha})
    ).image.tobytes()
    first = paint(0.5)
    assert paint(0.2) != first
    assert paint(0.5) == first


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [({}, "sketch: expected a picture"), ({"sketch": Image.new("L", (8, 8)), "alpha": 1.5}, "alpha: expected")],
)
def test_bad_inputs_are_named(painter, inputs, sentence):
    with pytest.raises(RequestError, match=sentence):
        painter.run(Request("x", inputs=inputs))


def test_the_object_lies_inside_its_outline(served):
    client, studio = served
    canvas = {"background": handle_file(DRAWN), "layers": [], "composite": None}
    for precision in studio.pool.precisions:
        file, facts = client.predict("a purple cone", canvas=canvas, seed=7, precision=precision, api_name="/sketch")
        with Image.open(file if isinstance(file, str) else file["path"]) as picture:
            red, green, blue = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)
        rows, columns = np.nonzero((red > green + 40) & (blue > green + 40))
        assert len(rows) > 200, precision
        with Image.open(DRAWN) as lines:
            ink = np.asarray(lines.convert("L")) < 128
        ink[:125] = False  # the horizon
        middle = np.argwhere(ink).mean(0)
        assert np.abs([rows.mean() - middle[0], columns.mean() - middle[1]]).max() < 16, precision
        assert facts["settings"]["steps"] == 1


def test_a_blank_page_without_words_is_said_and_with_words_is_painted(served):
    client, _ = served
    with pytest.raises(Exception, match="nothing is drawn and the prompt is empty"):
        client.predict("", canvas=None, api_name="/sketch")
    assert client.predict("a red cube", canvas=None, api_name="/sketch")


def ink(picture: Image.Image, reading: str, tmp_path, monkeypatch) -> np.ndarray:
    path = tmp_path / "given.png"
    picture.save(path)
    monkeypatch.setattr("apps.common.uploads.is_upload", lambda _: True)
    found = drawing.drawing_of({"background": str(path), "layers": []}, picture.size, reading)
    return np.asarray(found) == 0


def test_light_lines_on_dark_are_turned(tmp_path, monkeypatch):
    light = Image.open(DRAWN).convert("L")
    dark = light.point(lambda value: 255 - value)
    a, b = (ink(picture, READINGS[0], tmp_path, monkeypatch) for picture in (light, dark))
    assert a.any()
    # A grey that is exactly in the middle may fall on either side.
    assert (a != b).mean() < 0.01


def test_the_lines_of_a_photo_are_found(tmp_path, monkeypatch):
    ramp = np.tile(np.linspace(70, 190, 128, dtype=np.uint8), (128, 1))
    ramp[40:90, 40:90] = 20
    found = ink(Image.fromarray(ramp), READINGS[0], tmp_path, monkeypatch)
    rows, columns = np.nonzero(found)
    assert 0.005 < found.mean() < 0.1
    assert abs(rows.min() - 40) <= 3
    assert abs(columns.max() - 90) <= 3
    with pytest.raises(RequestError, match="reading: expected one of"):
        drawing.drawing_of({}, (8, 8), "upside down")


@pytest.mark.browser
@pytest.mark.slow
def test_each_stroke_paints_and_a_blank_page_says_nothing(browser, served):
    client, studio = served
    with visit(browser, client.src, slug="sketch") as tab:
        tab.locator("#nb-prompt textarea").fill("a green sphere")
        tab.locator("#nb-canvas canvas").first.wait_for()
        box = tab.locator("#nb-canvas canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.mouse.move(x - 40, y - 40)
        tab.mouse.down()
        for dx, dy in ((40, -40), (40, 40), (-40, 40), (-40, -40)):
            tab.mouse.move(x + dx, y + dy, steps=8)
        tab.mouse.up()
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=60_000)
        tab.locator("#nb-seen img").wait_for()
        tab.locator("#nb-generate:not([disabled])").wait_for()
        first = tab.locator("#nb-image-int4 img").evaluate("image => image.src")
        tab.locator(".nb-example").first.click()
        painted = (
            "before => { const now = document.querySelector('#nb-image-int4 img'); return now && now.src != before }"
        )
        tab.wait_for_function(painted, arg=first, timeout=60_000)
