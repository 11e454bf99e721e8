"""The variations app with its true small model, and the engine's mixing against the unmodified prior pipeline."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from gradio_client import handle_file
from PIL import Image

from apps.common import screenshots
from apps.redux.run import HERE
from engine import Engine, Request, RequestError
from engine.models import run_redux
from engine.models.catalogue import resolve
from tests.apps.conftest import visit

SPHERE, CONE = HERE / "sphere.png", HERE / "cone.png"


@pytest.fixture
def served(small_house):
    return small_house[0], small_house[1]["redux"]


@pytest.fixture(scope="module")
def painter() -> Engine:
    return Engine.load(dataclasses.replace(resolve("tiny-redux")), "bf16", device="cpu")


def pictures() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in (SPHERE, CONE)]


def path_of(file) -> str:
    return file if isinstance(file, str) else file["path"]


def test_words_of_pictures_are_those_of_the_unmodified_pipeline(painter):
    pipe, device = painter.pipe, torch.device("cpu")
    request = Request("", inputs={"images": pictures(), "weights": [3, 1]}).resolved(painter.spec)
    with torch.inference_mode():
        ours = run_redux.encode(pipe, painter.spec, request, device)
        text, pooled, _ = pipe.encode_prompt(prompt="", prompt_2=None, max_sequence_length=64)
        own = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
        theirs = FluxPriorReduxPipeline(**{**pipe.prior.components, **own})(
            pictures(),
            prompt_embeds=text.repeat(2, 1, 1),
            pooled_prompt_embeds=pooled.repeat(2, 1),
            prompt_embeds_scale=[0.75, 0.25],
            pooled_prompt_embeds_scale=[0.75, 0.25],
        )
    got, wanted = ours["prompt_embeds"].float(), theirs.prompt_embeds.float()
    assert got.shape == wanted.shape
    # BF16 sums in another order.
    assert (got - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert torch.allclose(ours["pooled_prompt_embeds"].float(), theirs.pooled_prompt_embeds.float(), atol=1e-2)


def test_a_prior_without_text_encoders_has_zeros_where_an_empty_prompt_would_be(painter, monkeypatch):
    monkeypatch.setattr(painter.pipe, "prior_reads_text", False)
    request = Request("", inputs={"images": pictures()[:1]}).resolved(painter.spec)
    with torch.inference_mode():
        made = run_redux.encode(painter.pipe, painter.spec, request, torch.device("cpu"))
    assert made["prompt_embeds"][:, :64].abs().max() == 0
    assert made["prompt_embeds"][:, 64:].abs().max() > 0
    assert made["pooled_prompt_embeds"].abs().max() == 0


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "images: expected at least one picture, got none"),
        ({"weights": [1, 2]}, "weights: expected 1 numbers"),
        ({"weights": [0]}, "not all of them 0"),
        ({"weights": [-1]}, "weights: expected 1 numbers, 0 or more"),
        ({"image_strength": 2}, "image_strength: expected a number from 0 to 1, got 2"),
    ],
)
def test_what_cannot_be_mixed_is_answered_in_words(painter, inputs, sentence):
    inputs = {"images": pictures()[:1], **inputs} if inputs else {}
    with pytest.raises(RequestError, match=sentence):
        painter.run(Request("", inputs=inputs))


def test_the_colour_of_the_picture_is_in_its_variation_and_seeds_repeat(served):
    client, studio = served
    ask = {"picture": handle_file(SPHERE), "seed": 3, "api_name": "/redux"}
    for precision in studio.pool.precisions:
        once, again = (client.predict("", precision=precision, **ask)[0] for _ in range(2))
        with Image.open(path_of(once)) as a, Image.open(path_of(again)) as b:
            assert a.tobytes() == b.tobytes()
            red, green, blue = np.asarray(a.convert("RGB")).astype(int).transpose(2, 0, 1)
        assert ((red > green + 40) & (blue > green + 40)).mean() > 0.02, precision


def test_a_mix_needs_a_picture_and_a_weight(served):
    client, _ = served
    with pytest.raises(Exception, match="picture: expected a picture to start from"):
        client.predict("", api_name="/redux")
    with pytest.raises(Exception, match="one picture at least to count"):
        client.predict("", picture=handle_file(SPHERE), weight=0, api_name="/redux")


@pytest.mark.browser
@pytest.mark.slow
def test_a_visitor_varies_an_example_and_mixes_a_second_picture(browser, served):
    client, studio = served
    with visit(browser, client.src, slug="redux") as tab:
        screenshots.set_steps(tab, 4)
        tab.locator("#nb-generate").click()
        tab.locator("#nb-message", has_text="expected a picture to start from").wait_for()
        tab.locator(".nb-example").first.click()
        screenshots.wait_for_quiet(tab)
        tab.locator("#nb-more button").first.click()
        tab.locator("#nb-second canvas").first.wait_for()
        tab.locator("#nb-second input[type=file]").first.set_input_files(CONE)
        screenshots.wait_for_quiet(tab)
        tab.locator("#nb-generate:not([disabled])").click()
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=120_000)
