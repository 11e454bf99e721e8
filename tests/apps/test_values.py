"""The App value, the controls, the styles: what is data refuses to be wrong."""

from __future__ import annotations

import dataclasses

import pytest

from apps import run
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
    own = {"prompt", "seed", "steps", "guidance", "style", "style_words", "width", "height"}
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


@pytest.mark.parametrize(
    ("words", "painted"),
    [
        ("", "an anime"),
        ("  ", "an anime"),
        ("{prompt} carved in ice", "a cube carved in ice"),
        ("carved in ice", "a cube, carved in ice"),
        ("{x} {0.__class__} {prompt} {", "{x} {0.__class__} a cube {"),
        ("{", "a cube, {"),
    ],
)
def test_words_of_ones_own_take_the_place_of_a_style(words, painted):
    assert styles.apply("Anime", "a cube", words).startswith(painted)


@pytest.mark.parametrize("words", ["x" * 501, 5, ["a"]])
def test_words_that_cannot_be_used_are_refused(words):
    with pytest.raises(RequestError, match="style_words: expected a text of at most 500 characters"):
        styles.apply("None", "a cube", words)


def test_words_of_a_style_are_judged_with_the_prompt(make_studio):
    studio = make_studio().studio
    asked = studio.request({"prompt": "a child", "style_words": "naked, {prompt}"})
    assert asked.prompt == "naked, a child"
    assert not studio.judge(asked).allowed
    assert studio.judge(studio.request({"prompt": "a child"})).allowed


@pytest.mark.parametrize("app", run.apps(), ids=lambda app: app.slug)
def test_every_app_has_examples_for_small_and_for_large_models(app):
    small, large = (app.examples_for(catalogue.resolve(app.models[place])) for place in (0, -1))
    assert small
    assert large
    assert small != large
    for model in (app.models[0], app.models[-1]):
        assert all(app.titles_for(catalogue.resolve(model)))


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
