"""The App value, the controls, the styles: what is data refuses to be wrong."""

from __future__ import annotations

import dataclasses

import pytest

from apps.common import styles
from apps.common.app import App
from apps.common.controls import ASPECTS, aspect_size, prompt, seed
from apps.flux_t2i.run import APP
from engine import RequestError
from engine.models import catalogue


def small(**changes) -> App:
    values = {
        "slug": "x", "title": "X", "summary": "x", "nibble": 1, "models": ("tiny",), "controls": (prompt(), seed()),
    }  # fmt: skip
    return App(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"controls": (prompt(), prompt())}, "two controls are named prompt"),
        ({"controls": (seed(),)}, "expected a control named 'prompt'"),
        ({"examples": ({"prompt": "a"}, {"promt": "b", "sed": 1})}, "example 2 sets promt, sed"),
        ({"models": ("tinny",)}, "got 'tinny'"),
        ({"models": ()}, "at least one model"),
        ({"nibble": 16}, "from 0 to 15"),
    ],
)
def test_a_wrong_app_cannot_be_made(changes, words):
    with pytest.raises(ValueError, match=words):
        small(**changes)


def test_an_app_is_frozen_and_gives_its_controls_by_name():
    app = small()
    assert app.control("seed").name == "seed"
    with pytest.raises(KeyError):
        app.control("steps")
    with pytest.raises(dataclasses.FrozenInstanceError):
        app.title = "Y"  # pyright: ignore


def test_the_text_to_image_app_names_its_models_and_examples():
    assert APP.models[0] == "tiny"
    assert all(example["prompt"] for example in APP.examples)
    own = {"prompt", "seed", "steps", "guidance", "style", "width", "height"}
    assert {c.name for c in APP.controls} == own | {"lora", "lora_file", "lora_strength"}


def test_a_model_without_guidance_has_no_such_control(make_studio):
    flags = ("--model", "schnell")
    assert "guidance" not in {control.name for control in make_studio(*flags).studio.controls}
    assert "guidance" in {control.name for control in make_studio().studio.controls}


def test_there_are_ten_styles_and_none_changes_nothing():
    assert len(styles.STYLES) == 10
    assert styles.apply("None", "  a cube ") == "  a cube "
    assert styles.apply(None, "a cube") == "a cube"


@pytest.mark.parametrize("style", [name for name in styles.STYLES if name != styles.NONE])
@pytest.mark.parametrize("text", ["a cube", "{prompt}", "{0.__class__} {", "100 % %s", r"\1 \g<0>"])
def test_a_style_keeps_the_prompt_as_it_is(style, text):
    before, after = styles.STYLES[style].split(styles.MARK)
    assert styles.apply(style, text) == before + text + after


def test_an_unknown_style_is_refused_by_name():
    with pytest.raises(RequestError, match="style: expected one of None, Cinematic"):
        styles.apply("Baroque", "a cube")


@pytest.mark.parametrize("model", ["tiny", "schnell", "dev"])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_aspects_keep_shape_area_and_limits(model, aspect):
    spec = catalogue.resolve(model)
    width, height = aspect_size(spec, aspect)
    across, down = ASPECTS[aspect]
    assert width % 16 == height % 16 == 0
    assert spec.size.low <= min(width, height)
    assert max(width, height) <= spec.size.high
    assert width / height == pytest.approx(across / down, rel=0.12)
    assert width * height == pytest.approx(spec.size.default**2, rel=0.12)
