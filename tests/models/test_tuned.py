"""The small models that are the small FLUX with a LoRA: they follow what they are given, in 16 bits and in 4."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from PIL import Image

from engine import Engine, Request
from engine.errors import ModelError
from engine.metrics import psnr
from engine.models import catalogue


def engines(name: str) -> dict[str, Engine]:
    first = Engine.load(name, "bf16", device="cpu")
    return {"bf16": first, "int4": Engine.load(name, "int4", device="cpu", share=first)}


def circle() -> Image.Image:
    """A control map: the outline of a ball above a horizon."""
    lines = np.zeros((256, 256), np.uint8)
    cv2.circle(lines, (128, 150), 44, 255, 1)
    return Image.fromarray(lines).convert("RGB")


def test_canny_paints_along_the_lines_in_both_precisions():
    request = Request("a red matte sphere on a grey floor under a blue sky", seed=3, inputs={"control_image": circle()})
    pictures = {name: engine.run(request).image for name, engine in engines("tiny-canny").items()}
    assert psnr(pictures["bf16"], pictures["int4"]) >= 24
    for name, picture in pictures.items():
        red, green, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
        ball = (red > green + 60) & (red > blue + 60)
        inside = np.zeros((256, 256), np.uint8)
        cv2.circle(inside, (128, 150), 44, 1, -1)
        assert (ball & (inside > 0)).sum() >= 0.8 * inside.sum(), name
        assert (ball & (inside == 0)).sum() <= 0.15 * inside.sum(), name


def test_fill_paints_the_named_object_into_the_hole():
    scene = Image.fromarray(np.linspace(200, 120, 256, dtype=np.uint8)[:, None].repeat(256, 1)).convert("RGB")
    mask = np.zeros((256, 256), np.uint8)
    mask[90:200, 80:180] = 255
    request = Request("a green cube", seed=5, inputs={"image": scene, "mask_image": Image.fromarray(mask)})
    pictures = {name: engine.run(request).image for name, engine in engines("tiny-fill").items()}
    assert psnr(pictures["bf16"], pictures["int4"]) >= 24
    for name, picture in pictures.items():
        red, green, blue = np.asarray(picture).astype(int).transpose(2, 0, 1)
        painted = (green > red + 25) & (green > blue + 25)
        assert painted[mask > 0].mean() >= 0.1, name
        assert painted[mask == 0].mean() <= 0.02, name


def test_the_same_request_gives_the_same_bits():
    engine = Engine.load("tiny-depth", "int4", device="cpu")
    near = np.zeros((256, 256), np.uint8)
    near[128:] = np.linspace(0, 160, 128, dtype=np.uint8)[:, None]
    request = Request("a blue cone", seed=11, inputs={"control_image": Image.fromarray(near).convert("RGB")})
    assert engine.run(request).image.tobytes() == engine.run(request).image.tobytes()


def test_a_folder_without_the_lora_names_it(tmp_path):
    spec = catalogue.resolve("tiny-canny")
    with pytest.raises(ModelError, match="the LoRA of Tiny FLUX Canny is not there"):
        Engine.load(dataclasses.replace(spec, lora=str(tmp_path / "nowhere.safetensors")), "bf16", device="cpu")
