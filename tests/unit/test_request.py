"""A Request is checked field by field, and each refusal is one sentence that names the field."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType

import pytest
from PIL import Image

from engine import Request, RequestError, Result, read_metadata
from engine.models.catalogue import CATALOGUE, ModelSpec, Range, resolve

SPEC = ModelSpec("m", "M", "flux", "FluxPipeline", "nowhere", size=Range(256, 128, 512, 16), steps=Range(12, 1, 50))


def test_defaults_come_from_the_model():
    full = Request("a cube").resolved(SPEC)
    assert (full.steps, full.guidance, full.width, full.height) == (12, 3.5, 256, 256)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "", "empty"),
        ("prompt", " \n\t", "empty"),
        ("prompt", "x" * 10_000, "10000"),
        ("prompt", 5, "int"),
        ("steps", 0, "from 1 to 50"),
        ("steps", 2.5, "whole"),
        ("steps", True, "whole"),
        ("width", 250, "multiple of 16"),
        ("height", 5000, "from 128 to 512"),
        ("guidance", math.nan, "from 1 to 10"),
        ("guidance", 99, "from 1 to 10"),
        ("seed", -1, "from 0"),
        ("seed", 2**40, "from 0"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object, says: str):
    arguments = {"prompt": "a cube", field: value}
    with pytest.raises(RequestError, match=says) as caught:
        Request(**arguments).resolved(SPEC)  # pyright: ignore[reportArgumentType]
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


def test_guidance_is_ignored_by_a_model_without_it():
    spec = resolve("schnell")
    assert Request("a cube", guidance=50).resolved(spec).guidance == 0.0


def result(prompt: str = "ein Würfel ∎") -> Result:
    request = Request(prompt, seed=7).resolved(SPEC)
    stages = MappingProxyType({"denoise": 1.0})
    image = Image.new("RGB", (16, 16), "red")
    return Result(image, request, "m", "int4", "w4a8", "avx2", "CPU", 1.0, 80.0, stages, 10, 20, {"torch": "2"})


def test_a_png_carries_its_settings(tmp_path: Path):
    path = result().save(tmp_path / "a.png")
    settings = read_metadata(path)
    assert settings is not None
    assert settings["prompt"] == "ein Würfel ∎"
    assert (settings["seed"], settings["precision"], settings["backend"]) == (7, "int4", "avx2")


def test_equal_pictures_are_equal_files(tmp_path: Path):
    first, second = result().save(tmp_path / "a.png"), result().save(tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()


def test_nothing_is_left_behind_when_saving_fails(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        result().save(tmp_path / "missing" / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_png_has_no_settings(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert read_metadata(tmp_path / "plain.png") is None


def test_every_default_of_the_catalogue_is_a_valid_request():
    for spec in CATALOGUE.values():
        assert Request("a cube").resolved(spec).width
