"""The six apps with their true small models under rough use: mistakes are answered in words, and the next run works.

Two tabs at once, Stop and a tab closed in the middle want a browser: test_visits.py has them, for all six.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from PIL import Image

from apps import run
from tests.apps.test_house import SLUGS

APPS = {app.slug: app for app in run.apps()}
EXAMPLE = Path(run.__file__).parent / "fill" / "examples"
WITH_PICTURES = ("sketch", "depth_canny", "fill", "redux")


@pytest.fixture
def client(small_house) -> Client:
    return small_house[0]


def given(slug: str, picture: Any) -> dict[str, Any]:
    """The picture where the app takes one."""
    file = handle_file(picture) if picture is not None else None
    if slug in ("sketch", "fill"):
        layers = [handle_file(EXAMPLE / "pair-mask.png")] if slug == "fill" else []
        return {"canvas": {"background": file, "layers": layers, "composite": None}}
    return {"picture": file} if slug in WITH_PICTURES else {}


def ask(client: Client, slug: str, prompt: str, picture: Any = EXAMPLE / "pair.png", **more: Any) -> tuple[int, int]:
    """The size of the picture that comes back."""
    steps = {} if slug == "sketch" else {"steps": 1}
    asked = {**given(slug, picture), **steps, "precision": "int4", **more}
    file, _ = client.predict(prompt, **asked, api_name=f"/{slug}")
    with Image.open(file if isinstance(file, str) else file["path"]) as painted:
        return painted.size


def saved(folder: Path, kind: str) -> Path:
    """A picture of a bad or rare kind."""
    path = folder / f"{kind}.png"
    with Image.open(EXAMPLE / "pair.png") as file:
        picture = file.convert("RGB")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        path = path.with_suffix(".jpg")
        picture.resize((320, 200)).save(path, exif=exif)
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
        picture.convert("CMYK").save(path)
    elif kind == "one pixel":
        picture.resize((1, 1)).save(path)
    elif kind == "long":
        picture.resize((2000, 8)).save(path)
    elif kind == "see-through":
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(path)
    elif kind == "palette":
        picture.quantize(16).save(path)
    elif kind == "grey 16 bits":
        picture.convert("I;16").save(path)
    elif kind == "huge":
        path = path.with_suffix(".jpg")
        picture.resize((6000, 4000)).save(path, quality=30)
    elif kind == "large":
        Image.new("1", (9000, 9000)).save(path)
    elif kind == "bomb":
        Image.new("1", (30000, 30000)).save(path)
    elif kind == "no picture":
        path.write_text("not a picture at all")
    elif kind == "damaged":
        held = io.BytesIO()
        picture.save(held, "PNG")
        path.write_bytes(held.getvalue()[: len(held.getvalue()) // 2])
    return path


@pytest.mark.parametrize(
    "kind", ["turned", "cmyk", "one pixel", "long", "see-through", "palette", "grey 16 bits", "huge"]
)
@pytest.mark.parametrize("slug", WITH_PICTURES)
def test_pictures_of_rare_kinds_are_taken(client, slug, kind, tmp_path):
    assert ask(client, slug, "a red cube", saved(tmp_path, kind)) == (256, 256)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("large", "at most 64 million pixels, got 9000 x 9000"),
        ("bomb", "too large to open"),
        ("no picture", "could not be read as a picture"),
        ("damaged", "could not be read as a picture"),
    ],
)
@pytest.mark.parametrize("slug", WITH_PICTURES)
def test_pictures_that_cannot_be_used_are_answered_in_words(client, slug, kind, sentence, tmp_path):
    with pytest.raises(Exception, match=sentence):
        ask(client, slug, "a red cube", saved(tmp_path, kind))
    assert ask(client, slug, "a red cube") == (256, 256), "the next request works"


@pytest.mark.parametrize("slug", ["flux_t2i", "sana_t2i", "depth_canny", "fill"])
def test_no_prompt_is_answered_in_words(client, slug):
    with pytest.raises(Exception, match="prompt: expected a description of the picture"):
        ask(client, slug, "  ")


@pytest.mark.parametrize("slug", ["depth_canny", "fill", "redux"])
def test_no_picture_is_answered_in_words(client, slug):
    with pytest.raises(Exception, match="expected a picture to start from"):
        ask(client, slug, "a red cube", None)


@pytest.mark.parametrize("slug", SLUGS)
def test_long_prompts_braces_and_odd_sizes(client, slug):
    with pytest.raises(Exception, match="prompt: expected at most 4000 characters, got 10000"):
        ask(client, slug, "x" * 10_000)
    with pytest.raises(Exception, match="width: expected a whole number"):
        ask(client, slug, "a red cube", width=257)
    wide = {"width": 288, "height": 256}
    assert ask(client, slug, "{a.__class__} {0} { %s \\ <b>bold</b>", style="Anime", **wide) == (288, 256)
    for words in ("{", "{x} {0} {prompt.__class__} {prompt} }", "%s \\1"):
        assert ask(client, slug, "a red cube", style_words=words) == (256, 256)
    with pytest.raises(Exception, match="style_words: expected a text of at most 500 characters, got 9000"):
        ask(client, slug, "a red cube", style_words="{prompt}" * 1125)


def test_an_unknown_choice_is_answered_in_words(client):
    for more in ({"task": "Burn it"}, {"task": "Widen the picture", "side": "Inside"}):
        with pytest.raises(Exception, match="expected one of"):
            ask(client, "fill", "a red cube", **more)
    with pytest.raises(Exception, match="model: expected one of tiny-depth, tiny-canny"):
        ask(client, "depth_canny", "a red cube", model="none such")
    with pytest.raises(Exception, match="model: expected one of tiny-depth, tiny-canny"):
        ask(client, "depth_canny", "a red cube", model=["tiny-canny"])
    with pytest.raises(Exception, match="style: expected one of None, Cinematic"):
        ask(client, "flux_t2i", "a red cube", style=["Anime"])


@pytest.mark.parametrize("name", ["low", "high"])
@pytest.mark.parametrize("value", [-1, 256, "x"])
def test_a_threshold_out_of_range_is_answered_in_words(client, name, value):
    with pytest.raises(Exception, match=f"{name}: expected a number from 0 to 255"):
        ask(client, "depth_canny", "a red cube", model="tiny-canny", **{name: value})


@pytest.mark.parametrize(
    ("slug", "name", "kind", "sentence"),
    [
        ("fill", "mask", "damaged", "mask: the file could not be read"),
        ("fill", "mask", "no picture", "mask: the file could not be read"),
        ("fill", "mask", "large", "mask: expected at most 64 million pixels"),
        ("redux", "second", "damaged", "second: the file could not be read"),
        ("redux", "third", "bomb", "third: the picture is too large"),
    ],
)
def test_further_pictures_that_cannot_be_used_are_named(client, slug, name, kind, sentence, tmp_path):
    with pytest.raises(Exception, match=sentence):
        ask(client, slug, "a red cube", **{name: handle_file(saved(tmp_path, kind))})
    assert ask(client, slug, "a red cube") == (256, 256), "the next request works"


@pytest.mark.parametrize("kind", ["turned", "cmyk", "one pixel", "see-through", "palette", "grey 16 bits"])
@pytest.mark.parametrize(("slug", "name"), [("fill", "mask"), ("redux", "second"), ("depth_canny", "picture")])
def test_further_pictures_of_rare_kinds_are_taken(client, slug, name, kind, tmp_path):
    file = saved(tmp_path, kind)
    if slug == "depth_canny":  # as a map that is followed as it is
        assert ask(client, slug, "a red cube", file, ready=True) == (256, 256)
    else:
        assert ask(client, slug, "a red cube", **{name: handle_file(file)}) == (256, 256)


def test_a_blank_mask_and_layers_without_a_stroke_are_answered_in_words(client, tmp_path):
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (256, 256), (0, 0, 0, 0)).save(clear)
    for layers in ([], [handle_file(clear)]):
        canvas = {"background": handle_file(EXAMPLE / "pair.png"), "layers": layers, "composite": None}
        with pytest.raises(Exception, match="nothing is marked"):
            client.predict("a red cube", canvas=canvas, api_name="/fill")
        with pytest.raises(Exception, match="nothing is drawn and the prompt is empty"):
            client.predict("", canvas=canvas | {"background": None}, api_name="/sketch")
