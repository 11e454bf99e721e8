"""On a CPU without BF16 instructions the VAE works in 32 bits, and models that are given pictures run all the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.lora_quality import requests
from engine.generate import Engine
from engine.models import loading


@pytest.mark.parametrize("name", ["tiny-canny", "tiny-fill"])
def test_pictures_go_in_where_the_vae_has_another_format(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "has_bf16_instructions", lambda: False)
    engine = Engine.load(name, "int4", device="cpu")
    assert engine.pipe.vae.dtype != engine.pipe.transformer.dtype
    image = engine.run(replace(requests(name, 1)[0], steps=1)).image
    assert np.asarray(image).std() > 1
