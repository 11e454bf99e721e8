"""Pictures that are painted over before they are used: depth and edges, variations."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from gradio.utils import get_upload_folder
from gradio_client import handle_file
from PIL import Image

from apps.common import screenshots, uploads
from apps.common.uploads import open_painted, strokes
from apps.depth_canny.run import prepare as prepare_map
from apps.redux.run import prepare as prepare_mix
from engine import RequestError
from engine.models import catalogue
from tests.apps.conftest import visit
from tests.apps.test_browser import text
from tests.apps.test_rough import EXAMPLE, saved
from tests.apps.test_visits import SECONDS, give, picture_of, set_steps, stroke, upload, write

PAIR = EXAMPLE / "pair.png"
WEIGHTS = {"weight": 1, "second_weight": 1, "third_weight": 1, "image_strength": 1, "prompt_strength": 1}
BLANK = {"background": None, "layers": [], "composite": None}


@pytest.fixture
def folder() -> Path:
    made = Path(get_upload_folder()) / "nibble-test-painted"
    made.mkdir(parents=True, exist_ok=True)
    return made


def layer(folder: Path, size: tuple[int, int] = (64, 64), colour: str | None = "#ff0000") -> str:
    """A layer whose upper left quarter is painted, or none of it; the file's path."""
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    if colour:
        picture.paste(colour, (0, 0, size[0] // 2, size[1] // 2))
    path = folder / f"layer-{size[0]}-{colour}.png"
    picture.save(path)
    return str(path)


def grey(folder: Path) -> str:
    Image.new("RGB", (128, 64), "#808080").save(folder / "grey.png")
    return str(folder / "grey.png")


def test_strokes_lie_over_the_picture_whatever_the_size_of_their_layer(folder):
    painted = open_painted({"background": grey(folder), "layers": [layer(folder)], "composite": None}, "picture")
    assert (painted.mode, painted.size) == ("RGB", (128, 64))
    assert painted.getpixel((5, 5)) == painted.getpixel((60, 30)) == (255, 0, 0)
    assert painted.getpixel((70, 5)) == painted.getpixel((5, 40)) == (128, 128, 128)


def test_strokes_one_can_see_through_are_mixed_with_the_picture(folder):
    Image.new("RGBA", (8, 8), (255, 255, 255, 128)).save(folder / "veil.png")
    painted = open_painted({"background": grey(folder), "layers": [str(folder / "veil.png")]}, "picture")
    assert painted.getpixel((64, 32)) == pytest.approx((192, 192, 192), abs=1)


def test_strokes_alone_lie_on_white_paper(folder):
    painted = open_painted(BLANK | {"layers": [layer(folder)]}, "picture")
    assert painted.getpixel((5, 5)) == (255, 0, 0)
    assert painted.getpixel((60, 60)) == (255, 255, 255)


@pytest.mark.parametrize("value", [None, {}, BLANK, {"background": None}, {"path": None, "background": None}])
def test_nothing_is_no_picture(value):
    assert open_painted(value, "picture") is None


def test_what_was_painted_and_rubbed_out_is_nothing(folder):
    assert open_painted(BLANK | {"layers": [layer(folder, colour=None)]}, "picture") is None


def test_a_plain_picture_is_taken_as_it_is(folder):
    path = grey(folder)
    for value in (path, {"path": path}, BLANK | {"background": path}, BLANK | {"background": {"path": path}}):
        assert open_painted(value, "picture").getcolors() == [(128 * 64, (128, 128, 128))]


@pytest.mark.parametrize("layers", [5, "x", {"path": "x"}, [3], ["/etc/hostname"], [{"path": str(PAIR)}]])
def test_layers_that_cannot_be_used_are_named(folder, layers):
    with pytest.raises(RequestError, match="picture: expected"):
        strokes({"background": grey(folder), "layers": layers}, "picture")


@pytest.mark.parametrize("model", ["tiny-depth", "tiny-canny"])
def test_the_map_is_made_of_the_painted_picture(folder, model):
    spec = catalogue.resolve(model)
    values = {"width": 128, "height": 128, "low": 100, "high": 200, "detail": 100}
    plain, painted = (
        np.asarray(prepare_map(values | {"picture": BLANK | {"background": grey(folder), "layers": drawn}}, spec)[
            "control_image"
        ]).astype(int)
        for drawn in ([], [layer(folder)])
    )  # fmt: skip
    assert plain.shape == painted.shape == (128, 128, 3)
    assert np.abs(plain - painted).max() > 100
    as_it_is = values | {"ready": True, "picture": BLANK | {"background": grey(folder), "layers": [layer(folder)]}}
    assert prepare_map(as_it_is, spec)["control_image"].getpixel((5, 5)) == (255, 0, 0)


def test_each_picture_of_a_mix_is_painted_over_and_empty_editors_do_not_count(folder):
    spec = catalogue.resolve("tiny-redux")
    over = BLANK | {"background": grey(folder), "layers": [layer(folder)]}
    rubbed = BLANK | {"layers": [layer(folder, colour=None)]}
    made = prepare_mix(WEIGHTS | {"picture": BLANK, "second": over, "third": rubbed, "second_weight": 0.5}, spec)
    assert made["weights"] == [0.5]
    assert [picture.getpixel((5, 5)) for picture in made["images"]] == [(255, 0, 0)]
    with pytest.raises(RequestError, match="picture: expected a picture to start from"):
        prepare_mix(WEIGHTS | {"picture": BLANK, "second": rubbed, "third": None}, spec)


def pixels(file) -> np.ndarray:
    with Image.open(file if isinstance(file, str | io.BytesIO) else file["path"]) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("slug", ["depth_canny", "redux"])
def test_the_interface_takes_a_plain_picture_and_a_painted_one(small_house, slug, folder):
    client = small_house[0]
    painted = layer(folder, (256, 256), "#ffff00")
    whole, empty, over = (
        pixels(client.predict("a red cube", picture=picture, seed=3, steps=2, precision="int4", api_name=f"/{slug}")[0])
        for picture in (
            handle_file(PAIR),
            BLANK | {"background": handle_file(PAIR)},
            BLANK | {"background": handle_file(PAIR), "layers": [handle_file(painted)]},
        )
    )
    assert (whole == empty).all()
    assert np.abs(whole - over).mean() > 1


def shown(tab, selector: str) -> np.ndarray:
    return pixels(io.BytesIO(tab.request.get(tab.locator(selector).evaluate("image => image.src")).body()))


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(("slug", "seen"), [("depth_canny", "#nb-seen img"), ("redux", "#nb-image-bf16 img")])
def test_what_a_visitor_paints_over_a_picture_reaches_the_model(browser, small_house, slug, seen):
    client, _ = small_house
    with visit(browser, client.src, slug=slug) as tab:
        screenshots.set_steps(tab, 2)
        screenshots.set_seed(tab, 7)
        upload(tab, slug, PAIR)
        write(tab, "a red cube")
        made = []
        for number in range(3):
            if number == 1:
                stroke(tab, (-90, -60), (90, -60), (-90, -30), (90, -30), name=picture_of(slug))
            if number == 2:
                tab.locator("#nb-picture button[aria-label=Undo]").click()
            tab.locator("#nb-generate:not([disabled])").click()
            tab.locator("#nb-status-int4", has_text="Done").wait_for(state="detached")
            tab.locator("#nb-status-int4", has_text="Done").wait_for(timeout=1000 * SECONDS)
            screenshots.wait_for_both(tab, SECONDS)
            made.append(shown(tab, seen))
        assert np.abs(made[0] - made[1]).max() > 30
        assert (made[0] == made[2]).all(), "undone, it is the picture as it was"


@pytest.mark.browser
@pytest.mark.slow
def test_an_upload_is_sent_a_few_times_and_one_of_a_cameras_size_smaller(browser, small_house, tmp_path, monkeypatch):
    taken: list[tuple[int, int]] = []

    def spied(value, name):
        picture = open_painted(value, name)
        taken.append(picture.size)
        return picture

    monkeypatch.setattr(uploads, "open_painted", spied)
    with visit(browser, small_house[0].src, slug="depth_canny") as tab:
        sent: list[str] = []
        tab.on("request", lambda asked: asked.method == "POST" and sent.append(asked.url))
        upload(tab, "depth_canny", PAIR)
        tab.wait_for_timeout(2000)
        before = len(sent)
        tab.wait_for_timeout(3000)
        assert len(sent) == before, "the editor and the page do not answer each other for ever"
        screenshots.set_steps(tab, 2)
        with tab.expect_request(lambda asked: asked.url.endswith("/upload"), timeout=1000 * SECONDS):
            upload(tab, "depth_canny", saved(tmp_path, "huge"))
        screenshots.wait_for_quiet(tab, 2000)
        write(tab, "a red cube")
        tab.locator("#nb-generate").click(no_wait_after=True)
        screenshots.wait_for_both(tab, SECONDS)
    assert taken == [(1024, 683)]


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("slug", ["depth_canny", "sketch"])
def test_a_press_of_generate_waits_for_the_picture_just_given(browser, small_house, slug, tmp_path):
    client, studios = small_house
    with Image.open(PAIR) as picture:
        picture.convert("RGB").resize((3000, 2400)).save(tmp_path / "camera.jpg")
    with visit(browser, client.src, slug=slug) as tab:
        set_steps(tab, studios[slug], 2)
        if studios[slug].app.live:
            tab.locator("#nb-live input").uncheck()
        write(tab, "a red cube")
        give(tab, slug, tmp_path / "camera.jpg")
        tab.locator("#nb-generate").click(no_wait_after=True)
        tab.locator("#nb-message p, #nb-slider img").first.wait_for(timeout=1000 * SECONDS)
        assert text(tab, "#nb-message") == ""
        assert shown(tab, "#nb-seen img").std() > 10, "the map, or the lines, of that picture and not of an empty page"
