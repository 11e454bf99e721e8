"""Previews show where a run leads, and cost it nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from engine import Engine, Request, preview
from engine.preview import palette


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("tiny", "int4", device="cpu")


def test_the_last_preview_looks_like_the_picture(engine):
    seen: list[Image.Image] = []

    def look(step):
        picture = step.preview()
        assert (picture is None) == (step.index == 1)
        if picture is not None:
            seen.append(picture)

    request = Request("a large red metal sphere left of a small blue cube", seed=7)
    result = engine.run(request, on_step=look)
    small = np.asarray(result.image.resize((32, 32), Image.Resampling.BOX)).astype(float)
    errors = [np.abs(np.asarray(picture).astype(float) - small).mean() for picture in seen]
    assert seen[-1].size == (32, 32)
    assert errors[-1] < 14
    assert errors[-1] < errors[0]
    assert np.corrcoef(np.asarray(seen[-1]).ravel(), small.ravel())[0, 1] > 0.9


def test_looking_changes_nothing(engine):
    request = Request("a yellow cone", seed=3, steps=4)
    looked = engine.run(request, on_step=lambda step: step.preview and step.preview())
    assert looked.image.tobytes() == engine.run(request).image.tobytes()


def test_the_time_of_previews_is_not_the_runs(engine, monkeypatch):
    slow = preview.Watch._picture
    monkeypatch.setattr(preview.Watch, "_picture", lambda *args: (time.sleep(0.5), slow(*args))[1])
    began = time.perf_counter()
    result = engine.run(Request("a cone", seed=3, steps=4), on_step=lambda step: step.preview and step.preview())
    assert time.perf_counter() - began - result.seconds >= 1.5, "three previews of half a second"


def test_the_map_of_colours_is_made_once(engine):
    weight, bias = palette(engine.pipe.vae)
    assert weight.shape == (16, 3)
    assert bias.shape == (3,)
    assert palette(engine.pipe.vae)[0] is weight


def test_sana_is_previewed_too():
    seen: list[Image.Image | None] = []
    engine = Engine.load("tiny-sana", "int4", device="cpu")
    result = engine.run(
        Request("a large blue sphere on a grey floor", seed=3), on_step=lambda s: seen.append(s.preview())
    )
    last = seen[-1]
    assert seen[0] is None
    assert last is not None
    small = np.asarray(result.image.resize(last.size, Image.Resampling.BOX)).astype(float)
    assert last.size == (8, 8)
    assert np.corrcoef(np.asarray(last).ravel(), small.ravel())[0, 1] > 0.7
