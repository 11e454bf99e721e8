"""INT4 with a LoRA beside BF16 with the same LoRA through PEFT: how near the small models' pictures are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from engine import Engine, Request
from engine.metrics import psnr
from engine.models.catalogue import resolve


def drawing() -> Image.Image:
    """White lines on black: a ball on a floor."""
    picture = Image.new("RGB", (256, 256))
    ImageDraw.Draw(picture).ellipse((84, 96, 172, 184), outline="white", width=2)
    return picture


def depth() -> Image.Image:
    """A floor that comes nearer, and a ball on it."""
    rows = np.clip(np.arange(256) - 110, 0, 255).astype(np.uint8)
    picture = Image.fromarray(rows[:, None].repeat(256, 1)).convert("RGB")
    ImageDraw.Draw(picture).ellipse((84, 96, 172, 184), fill=(170, 170, 170))
    return picture


def hole() -> dict[str, Image.Image]:
    scene = Image.fromarray(np.linspace(200, 120, 256, dtype=np.uint8)[:, None].repeat(256, 1)).convert("RGB")
    mask = Image.new("L", (256, 256))
    ImageDraw.Draw(mask).rectangle((80, 90, 180, 200), fill=255)
    return {"image": scene, "mask_image": mask}


INPUTS = {
    "tiny-canny": {"control_image": drawing()},
    "tiny-depth": {"control_image": depth()},
    "tiny-fill": hole(),
}


def with_peft(name: str) -> Engine:
    """The 16-bit engine whose LoRA diffusers and PEFT put on, as they do for anybody."""
    spec = resolve(name)
    engine = Engine.load(replace(spec, lora=""), "bf16", device="cpu")
    path = Path(spec.lora)
    engine.pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_int4_with_a_lora_is_near_bf16_with_peft(name: str):
    request = Request("a red sphere on a grey floor", seed=3, inputs=INPUTS[name])
    peft = with_peft(name).run(request).image
    own = Engine.load(name, "int4", device="cpu").run(request).image
    assert psnr(peft, own) >= 24


def test_int4_sketches_are_near_bf16():
    """The sketch LoRA's strength follows the drawing's, so the engine runs both: merged in BF16, apart in INT4."""
    page = Image.eval(drawing(), lambda value: 255 - value)
    request = Request("a red sphere on a grey floor", seed=3, inputs={"sketch": page, "alpha": 0.4})
    first = Engine.load("tiny-sketch", "bf16", device="cpu")
    second = Engine.load("tiny-sketch", "int4", device="cpu", share=first)
    assert psnr(first.run(request).image, second.run(request).image) >= 24
