"""The depth and edges app with its true small models, through the interface, and with pictures of every bad kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from gradio.utils import get_upload_folder
from gradio_client import handle_file
from PIL import Image

from apps.common import recalling, screenshots, shell
from apps.common.uploads import open_picture
from apps.depth_canny import maps
from apps.depth_canny.run import APP, HERE, prepare
from engine import RequestError
from engine.models import catalogue
from engine.models.catalogue import zoo_folder
from tests.apps.conftest import Served, visit

PAIR = HERE / "examples" / "pair.png"


@pytest.fixture
def served(small_house):
    return small_house[0], small_house[1]["depth_canny"]


@pytest.fixture
def uploads():
    folder = Path(get_upload_folder()) / "nibble-test-uploads"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("model", ["tiny-depth", "tiny-canny"])
def test_both_precisions_paint_what_the_prompt_says_where_the_picture_has_it(served, model):
    client, studio = served
    for precision in studio.pool.precisions:
        file, facts = client.predict(
            picture=handle_file(PAIR), prompt="a yellow cube and a red cube", seed=4, model=model,
            precision=precision, api_name="/depth_canny",
        )  # fmt: skip
        with Image.open(file if isinstance(file, str) else file["path"]) as picture:
            red, green, blue = np.asarray(picture.convert("RGB")).astype(int).transpose(2, 0, 1)
        assert facts["settings"]["model"] == model
        coloured = (red > blue + 40) & (abs(red - green) + blue < 500)
        assert coloured.mean() > 0.02, precision


def test_without_a_picture_the_interface_says_what_is_missing(served):
    client, _ = served
    with pytest.raises(Exception, match="picture: expected a picture to start from"):
        client.predict(prompt="a red cube", picture=None, api_name="/depth_canny")


def test_files_outside_the_upload_folder_stay_closed(served):
    client, _ = served
    with pytest.raises(Exception, match="picture"):
        client.predict(prompt="a red cube", picture={"path": str(PAIR)}, api_name="/depth_canny")


def saved(picture: Image.Image, folder: Path, name: str, **options) -> str:
    picture.save(folder / name, **options)
    return str(folder / name)


def test_pictures_of_every_kind_become_plain_rgb(uploads):
    base = Image.new("RGB", (64, 32), "red")
    turned = Image.Exif()
    turned[274] = 6
    kinds = {
        "rgba.png": (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}),
        "grey.png": (Image.new("L", (8, 8), 9), {}),
        "one.png": (Image.new("RGB", (1, 1)), {}),
        "cmyk.jpg": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}),
        "palette.gif": (base.convert("P"), {}),
    }
    for name, (picture, options) in kinds.items():
        assert open_picture(saved(picture, uploads, name, **options), "picture").mode == "RGB", name
    assert open_picture(saved(base, uploads, "turned.jpg", exif=turned), "picture").size == (32, 64)
    assert open_picture(str(uploads / "rgba.png"), "picture").getpixel((0, 0)) == (255, 255, 255)


def test_what_is_no_picture_is_refused_with_a_sentence(uploads):
    good = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(good, "PNG")
    (uploads / "cut.png").write_bytes(good.getvalue()[:60])
    (uploads / "text.png").write_text("not a picture")
    for name in ("cut.png", "text.png", "absent.png"):
        with pytest.raises(RequestError, match="could not be read as a picture"):
            open_picture(str(uploads / name), "picture")
    with pytest.raises(RequestError, match="expected an uploaded picture file"):
        open_picture("/etc/hostname", "picture")
    with pytest.raises(RequestError, match="million pixels"):
        open_picture(saved(Image.new("1", (20000, 4000)), uploads, "huge.png"), "picture")


def test_maps_have_the_size_of_the_picture_and_say_what_is_near():
    with Image.open(PAIR) as file:
        picture = file.convert("RGB")
    lines = np.asarray(maps.edges(picture, 100, 200))
    assert set(np.unique(lines)) == {0, 255}
    near = np.asarray(maps.depth(picture.resize((256, 192)), str(zoo_folder() / "depth-estimator-tiny")))
    assert near.shape == (192, 256, 3)
    assert near[-8:].mean() > near[:8].mean() + 60, "the floor in front is nearer than the sky"


def test_less_detail_keeps_the_large_edges_and_drops_the_small_ones(uploads):
    tiny = catalogue.resolve("tiny-canny")
    dots = Image.new("RGB", (256, 256), "white")
    for place in range(0, 256, 4):
        dots.putpixel((place, 10), (90, 90, 90))
    dots.paste("black", (60, 60, 200, 200))
    values = {"picture": saved(dots, uploads, "dots.png"), "width": 256, "height": 256, "low": 100, "high": 200}
    whole, quarter = (
        np.asarray(prepare(values | {"detail": share}, tiny)["control_image"].convert("L")) for share in (100, 25)
    )
    assert whole.shape == quarter.shape == (256, 256)
    assert whole[:20].max() == 255
    assert quarter[:20].max() == 0
    assert min(whole[56:64].max(), quarter[56:64].max()) > 100
    for share in (9, 101, "x", None):
        with pytest.raises(RequestError, match="detail: expected a number from 10 to 100"):
            prepare(values | {"detail": share}, tiny)
    assert maps.reduced(dots.resize((8, 400)), 0.1).size == (8, 40)


def test_a_flat_picture_has_a_map_too():
    maps.depth(Image.new("RGB", (64, 64), "grey"), str(zoo_folder() / "depth-estimator-tiny"))


@pytest.mark.parametrize("model", ["tiny-depth", "tiny-canny"])
def test_the_canny_page_has_thresholds_and_the_depth_page_none(model):
    page = shell.build(Served("--model", model, app=APP).studio)
    shown = {part["props"].get("elem_id"): part["props"].get("visible") for part in page.config["components"]}
    assert shown["nb-low"] == shown["nb-high"] == (model == "tiny-canny")
    assert shown["nb-model"], "the page can switch to the other"


def test_the_interface_runs_the_model_it_is_asked_for(served):
    client, studio = served
    answers = {
        name: client.predict(
            "a red cube",
            picture=handle_file(PAIR),
            model=name,
            seed=3,
            steps=2,
            precision="int4",
            api_name="/depth_canny",
        )
        for name in studio.rooms
    }
    assert {name: facts["settings"]["model"] for name, (_, facts) in answers.items()} == {n: n for n in studio.rooms}
    depth, canny = (answers[name][1]["settings"]["controls"] for name in ("tiny-depth", "tiny-canny"))
    assert depth["ready"] is canny["ready"] is False
    assert (canny["low"], canny["high"]) == (100, 200)
    assert not {"low", "high"} & set(depth)


def test_a_picture_brings_its_model_and_thresholds_back(served):
    _, studio = served
    settings = {
        "model": "tiny-canny",
        "prompt": "a cube",
        "steps": 5,
        "controls": {"low": 40, "high": 300, "ready": True},
    }
    values, note = recalling.fit(settings, studio)
    assert values["model"] == "tiny-canny"
    assert (values["low"], values["ready"]) == (40, True)
    assert "high" not in values
    assert "left as they were: high" in note


@pytest.mark.browser
@pytest.mark.slow
def test_switching_the_model_shows_its_thresholds_and_it_paints(browser, served):
    client, studio = served
    with visit(browser, client.src, slug="depth_canny") as tab:
        screenshots.set_steps(tab, 4)
        tab.locator("#nb-ready").wait_for()
        assert not tab.locator("#nb-low").is_visible()
        for model, thresholds in (("Canny", "visible"), ("Depth", "hidden"), ("Canny", "visible")):
            tab.locator("#nb-model label", has_text=model).click()
            tab.locator("#nb-low").wait_for(state=thresholds)
            tab.locator("#nb-banner", has_text=f"Tiny FLUX {model}").wait_for()
            tab.locator("#nb-banner .nb-load-ready").wait_for(timeout=60_000)
        screenshots.set_steps(tab, 4)
        screenshots.choose_example(tab, APP)
        tab.locator("#nb-generate:not([disabled])").click()
        tab.locator("#nb-seen img").wait_for()
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=120_000)
        tab.locator("#nb-slider").wait_for(timeout=60_000)
