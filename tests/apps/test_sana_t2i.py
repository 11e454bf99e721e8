"""The SANA app with its true small model: pictures of the named colour, guidance of its own, words for bad values."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from apps.sana_t2i.run import APP
from tests.apps.conftest import really_served

PROMPT = "a cyan sphere and a red cylinder under a blue sky"


@pytest.fixture
def served(small_house):
    return small_house[0], small_house[1]["sana_t2i"]


def path_of(file) -> str:
    return file if isinstance(file, str) else file["path"]


def painted(client, **values) -> np.ndarray:
    file, facts = client.predict(prompt=PROMPT, seed=3, **values, api_name="/sana_t2i")
    assert facts["settings"]["model"] == "tiny-sana"
    with Image.open(path_of(file)) as picture:
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
        client.predict(prompt=PROMPT, pag=pag, api_name="/sana_t2i")


@pytest.mark.slow
def test_nvfp4_is_a_column_whose_weights_are_made_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with really_served(APP, "--precisions", "nvfp4", "bf16") as (client, studio):
        assert studio.pool.precisions == ("nvfp4", "bf16")
        file, facts = client.predict(PROMPT, seed=3, steps=4, precision="nvfp4", api_name="/generate")
        exact, _ = client.predict(PROMPT, seed=3, steps=4, precision="bf16", api_name="/generate")
    assert facts["settings"]["precision"] == "nvfp4"
    made = sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("nibble-studio/*") if path.is_dir())
    assert made == ["sana-tiny-nvfp4"] * studio.choice.spec.makes("nvfp4"), "one that ships is taken as it is"
    with Image.open(path_of(file)) as one, Image.open(path_of(exact)) as other:
        a, b = (np.asarray(picture.convert("RGB")).astype(float) for picture in (one, other))
    assert 10 * np.log10(255**2 / np.mean((a - b) ** 2)) > 15, "the same picture, more or less"
