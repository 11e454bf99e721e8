"""The fill app with its true small model: what is marked changes, the rest stays, and nothing marked is said."""

from __future__ import annotations

import numpy as np
import pytest
from gradio_client import handle_file
from PIL import Image, ImageOps

from apps.common import screenshots
from apps.fill import SIDES, TASKS, masks
from apps.fill.run import APP, HERE
from engine import RequestError
from tests.apps.conftest import visit

PICTURE, MASK = HERE / "pair.png", HERE / "pair-mask.png"


@pytest.fixture
def served(small_house):
    return small_house[0], small_house[1]["fill"]


def pixels(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_object_appears_in_the_hole_and_all_else_keeps_its_bits(served):
    client, studio = served
    canvas = {"background": handle_file(PICTURE), "layers": [handle_file(MASK)], "composite": None}
    with Image.open(MASK) as drawn:
        marked = np.asarray(drawn.getchannel("A")) > 127
    near = np.asarray(Image.fromarray(marked).resize((256, 256)))
    for precision in studio.pool.precisions:
        file, _ = client.predict(
            prompt="a large green sphere", canvas=canvas, seed=3, grow=0, precision=precision, api_name="/fill"
        )
        new, old = pixels(file if isinstance(file, str) else file["path"]), pixels(PICTURE)
        red, green, blue = new.transpose(2, 0, 1)
        assert ((green > red + 30) & (green > blue + 30))[near].mean() > 0.3, precision
        changed = np.flatnonzero((new != old).any(-1).any(0))
        ys, xs = np.nonzero(near)
        assert changed.min() >= xs.min() - 6
        assert changed.max() <= xs.max() + 6
        rows = np.flatnonzero((new != old).any(-1).any(1))
        assert rows.min() >= ys.min() - 6
        assert rows.max() <= ys.max() + 6


@pytest.mark.parametrize("canvas", [None, {"background": None, "layers": [], "composite": None}])
def test_an_empty_canvas_is_answered_in_words(served, canvas):
    client, _ = served
    with pytest.raises(Exception, match="canvas: expected a picture to start from"):
        client.predict(prompt="a red cube", canvas=canvas, api_name="/fill")


def test_a_picture_with_nothing_marked_is_answered_in_words(served):
    client, _ = served
    canvas = {"background": handle_file(PICTURE), "layers": [], "composite": None}
    with pytest.raises(Exception, match="nothing is marked"):
        client.predict(prompt="a red cube", canvas=canvas, api_name="/fill")


def test_masks_grow_and_turn_over():
    with pytest.raises(RequestError, match="nothing is marked"):
        masks.mask_of({}, None, (32, 32), 0, False)
    assert np.asarray(masks.mask_of({}, None, (32, 32), 0, True)).min() == 255


def test_pasting_back_keeps_every_pixel_beyond_the_seam():
    rng = np.random.default_rng(0)
    old, new = (Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2))
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 20:30] = 255
    out = np.asarray(masks.paste_back(new, old, Image.fromarray(mask), 6))
    assert (out[20:30, 20:30] == np.asarray(new)[20:30, 20:30]).all()
    far = np.ones((64, 64), bool)
    far[20 - 6 : 30 + 6, 20 - 6 : 30 + 6] = False
    assert (out[far] == np.asarray(old)[far]).all()


@pytest.mark.parametrize("side", SIDES)
def test_a_widened_picture_lies_where_it_should(side):
    picture, size = Image.new("RGB", (100, 50), "red"), (200, 200)
    page, mask = masks.widened(picture, size, 0.5, side, 8)
    red = (np.asarray(page) == (255, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (100, 50)
    starts = {"Left": (0, 75), "Right": (100, 75), "Top": (50, 0), "Bottom": (50, 150), "Middle": (50, 75)}
    assert (columns.min(), rows.min()) == starts[side]
    white = np.asarray(mask) > 127
    assert white[~red].all(), "all around it is painted"
    kept = ~white
    assert red[kept].all()
    assert kept.sum() == (100 - 8 * (2 - (side in ("Left", "Right")))) * (50 - 8 * (2 - (side in ("Top", "Bottom"))))


@pytest.mark.parametrize(
    ("share", "side", "sentence"), [(0.5, "Inside", "side: expected one of Middle"), (1.0, "Left", "fills the page")]
)
def test_what_cannot_be_widened_is_said(share, side, sentence):
    with pytest.raises(RequestError, match=sentence):
        masks.widened(Image.new("RGB", (64, 64)), (128, 128), share, side, 8)


def test_a_picture_is_widened_and_its_own_pixels_stay(served):
    client, _ = served
    canvas = {"background": handle_file(PICTURE), "layers": [], "composite": None}
    file, facts = client.predict(
        "a grey floor", canvas=canvas, task=TASKS[1], side="Left", share=50, overlap=0, feather=0, seed=3,
        precision="int4", api_name="/fill",
    )  # fmt: skip
    new = pixels(file if isinstance(file, str) else file["path"])
    with Image.open(PICTURE) as picture:
        small = np.asarray(ImageOps.contain(picture.convert("RGB"), (128, 128))).astype(int)
    assert (new[64:192, :128] == small).all()
    around = np.delete(new.reshape(-1, 3), np.arange(256 * 256).reshape(256, 256)[64:192, :128].ravel(), 0)
    assert (np.abs(around - 128).max(1) > 8).mean() > 0.5, "the grey page was painted"
    assert facts["settings"]["controls"]["task"] == TASKS[1]


@pytest.mark.browser
@pytest.mark.slow
def test_a_visitor_fills_an_example_and_an_upload_without_strokes_is_told(browser, served):
    client, studio = served
    with visit(browser, client.src, slug="fill") as tab:
        screenshots.set_steps(tab, 4)
        tab.locator("#nb-prompt textarea").fill("a red cube")
        tab.locator("#nb-generate").click()
        tab.locator("#nb-message", has_text="expected a picture to start from").wait_for()
        tab.locator("#nb-canvas input[type=file]").first.set_input_files(PICTURE)
        tab.locator("#nb-canvas canvas").first.wait_for()
        tab.locator("#nb-generate:not([disabled])").click()
        tab.locator("#nb-message", has_text="nothing is marked").wait_for()
        screenshots.choose_example(tab, APP)
        tab.locator("#nb-generate:not([disabled])").click()
        tab.locator("#nb-seen img").wait_for()
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=120_000)
        tab.locator("#nb-generate:not([disabled])").wait_for()
        tab.locator("#nb-reuse-int4").click()
        tab.locator("#nb-task label", has_text=TASKS[1]).click()
        tab.locator("#nb-generate").click()
        tab.locator("#nb-image-bf16 img").wait_for(state="hidden")
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=120_000)
