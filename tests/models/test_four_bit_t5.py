"""A 4-bit T5 in place of the model's own: the picture stays, the encoder shrinks, and what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, Request
from engine.errors import CheckpointError, ModelError
from engine.memory import module_bytes
from engine.metrics import psnr
from engine.models.catalogue import resolve
from tests.t5 import four_bit_t5

TINY = resolve("tiny")


@pytest.fixture(scope="module")
def own() -> Engine:
    return Engine.load("tiny", "int4", device="cpu")


@pytest.fixture(scope="module")
def file(own: Engine, tmp_path_factory) -> Path:
    """The small model's own T5 in four bits."""
    return four_bit_t5(own.pipe.text_encoder_2, tmp_path_factory.mktemp("t5") / "t5.safetensors")


def test_the_picture_stays_and_the_encoder_shrinks(own: Engine, file: Path):
    engine = Engine.load(replace(TINY, text_encoder=str(file)), "int4", device="cpu")
    request = Request("a large red metal sphere left of a small blue cube", seed=7)
    ours, wanted = engine.run(request).image, own.run(request).image
    assert psnr(ours, wanted) > 20
    assert not np.array_equal(np.asarray(ours), np.asarray(wanted))
    assert module_bytes(engine.pipe.text_encoder_2) < 0.75 * module_bytes(own.pipe.text_encoder_2)


def test_what_does_not_fit_is_named(file: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        Engine.load(replace(TINY, text_encoder=str(tmp_path / "none.safetensors")), "int4", device="cpu")
    with pytest.raises(ModelError, match="Tiny SANA has no T5 text encoder"):
        Engine.load(replace(resolve("tiny-sana"), text_encoder=str(file)), "int4", device="cpu")
