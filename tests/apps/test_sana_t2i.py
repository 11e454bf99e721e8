"""The SANA app with its true small model: pictures of the named colour, guidance of its own, words for bad values."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from apps.sana_t2i.run import APP
from tests.apps.conftest import really_served, visit

PROMPT = "a cyan sphere and a red cylinder under a blue sky"


@pytest.fixture(scope="module")
def served():
    with really_served(APP, "--model", "tiny-sana") as opened:
        yield opened


def painted(client, **values) -> np.ndarray:
    file, facts = client.predict(prompt=PROMPT, seed=3, **values, api_name="/generate")
    assert facts["settings"]["model"] == "tiny-sana"
    with Image.open(file if isinstance(file, str) else file["path"]) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_both_precisions_paint_the_colours_of_the_prompt(served):
    client, studio = served
    for precision in studio.pool.precisions:
        red, green, blue = painted(client, precision=precision).transpose(2, 0, 1)
        assert ((red > green + 80) & (red > blue + 80)).mean() > 0.01, precision
        assert ((green > red + 60) & (blue > red + 60)).mean() > 0.005, precision


def test_the_same_request_gives_the_same_bits_and_pag_another_picture(served):
    client, _ = served
    plain = painted(client, steps=6)
    assert (painted(client, steps=6) == plain).all()
    assert (painted(client, steps=6, pag=2.0) != plain).any()


def test_sizes_are_true(served):
    client, _ = served
    assert painted(client, steps=2, width=320, height=256).shape == (256, 320, 3)


@pytest.mark.parametrize("pag", [-1, 11, True])
def test_a_pag_scale_out_of_range_is_answered_in_words(served, pag):
    client, _ = served
    with pytest.raises(Exception, match="pag: expected a number from 0 to 10"):
        client.predict(prompt=PROMPT, pag=pag, api_name="/generate")


@pytest.mark.browser
@pytest.mark.slow
def test_a_visitor_paints_with_both(browser, served):
    client, studio = served
    with visit(browser, client.src) as tab:
        tab.locator(".nb-example").first.click()
        tab.wait_for_function("document.querySelector('#nb-prompt textarea').value.includes('cyan sphere')")
        tab.locator("#nb-generate:not([disabled])").click()
        for precision in studio.pool.precisions:
            tab.locator(f"#nb-image-{precision} img").wait_for(timeout=120_000)
        tab.locator("#nb-slider").wait_for(timeout=60_000)
