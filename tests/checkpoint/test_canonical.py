"""Our own layout is checked as closely as others' are, whoever reads it: a model or the converter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import SVDQuantFluxTransformer
from engine.checkpoint.translate import convert
from engine.errors import CheckpointError
from tests.checkpoint.test_layouts import FLUX

OUT = "transformer_blocks.0.attn.to_out.0"
MODULATION = "transformer_blocks.0.norm1.linear"
Change = Callable[[dict[str, Tensor]], object]


def first_value(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


def as_type(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("canonical") / "flux.safetensors"
    convert(FLUX, path, "canonical")
    return path


def damaged(canonical: Path, folder: Path, change: Change, metadata: Change = lambda _: None) -> Path:
    tensors = load_file(canonical)
    with safe_open(canonical, "pt") as file:
        data = file.metadata()
    change(tensors)
    metadata(data)
    save_file(tensors, folder / "damaged.safetensors", metadata=data)
    return folder / "damaged.safetensors"


FAULTS: list[tuple[Change, str]] = [
    (first_value(f"{OUT}.wscales", float("nan")), r"wscales holds NaN or infinity"),
    (first_value(f"{MODULATION}.zeros", float("inf")), r"zeros holds NaN or infinity"),
    (first_value("x_embedder.weight", float("nan")), r"x_embedder\.weight holds NaN or infinity"),
    (first_value(f"{OUT}.smooth", 0.0), r"smooth holds a zero"),
    (as_type(f"{OUT}.wscales", torch.float32), r"wscales is F32, expected bfloat16 or float16"),
    (as_type(f"{OUT}.codes", torch.int8), r"codes is I8, expected uint8"),
    (as_type(f"{OUT}.lora_up", torch.float32), r"lora_up is F32"),
    (as_type(f"{MODULATION}.scales", torch.float8_e4m3fn), r"scales is F8_E4M3"),
    (as_type("x_embedder.weight", torch.int8), r"x_embedder\.weight is I8"),
    (lambda tensors: tensors.update({"stranger.weight": torch.ones(2)}), r"stranger\.weight"),
    (lambda tensors: tensors.pop(f"{OUT}.lora_down"), r"lora_down"),
    (lambda tensors: tensors.update({f"{OUT}.wscales": tensors[f"{OUT}.wscales"][:, :1].clone()}), r"has shape"),
]
# Copied as they are to the same layout; whoever loads the copy is told.
COPIED = ("lora_down", "has shape")
CASES = [
    (to, change, sentence)
    for to in (None, "canonical", "nunchaku", "nunchaku_lite")
    for change, sentence in FAULTS
    if to != "canonical" or sentence not in COPIED
]


def use(path: Path, out: Path, to: str | None) -> None:
    """Convert, or load for None."""
    if to is None:
        SVDQuantFluxTransformer.from_pretrained(path, device="cpu")
    else:
        convert(path, out, to)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("to", "change", "sentence"), CASES)
def test_what_is_wrong_is_named(canonical: Path, tmp_path: Path, to: str | None, change: Change, sentence: str):
    path = damaged(canonical, tmp_path, change)
    with pytest.raises(CheckpointError, match=sentence):
        use(path, tmp_path / "out", to)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("weight", [{"dtype": "int3", "group_size": 64}, {"dtype": "int4", "group_size": 32}])
def test_a_quantization_that_there_is_none_of_is_refused(canonical: Path, tmp_path: Path, weight: dict):
    def change(data: dict) -> None:
        details = json.loads(data["quantization_config"]) | {"weight": weight}
        data["quantization_config"] = json.dumps(details)

    path = damaged(canonical, tmp_path, lambda _: None, change)
    with pytest.raises(CheckpointError, match="as weight dtype and group_size, got"):
        convert(path, tmp_path / "out", "nunchaku")


def test_an_nvfp4_file_with_int4_scales_is_refused(canonical: Path, tmp_path: Path):
    def change(data: dict) -> None:
        details = json.loads(data["quantization_config"]) | {"weight": {"dtype": "nvfp4", "group_size": 16}}
        data["quantization_config"] = json.dumps(details)

    path = damaged(canonical, tmp_path, lambda _: None, change)
    with pytest.raises(CheckpointError, match=r"wscales is BF16, expected float8_e4m3fn"):
        SVDQuantFluxTransformer.from_pretrained(path, device="cpu")
