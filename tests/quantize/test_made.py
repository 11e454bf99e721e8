"""NVFP4 for a small model that ships without: made once of its 16-bit weights and kept, made anew for others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine import Engine, Request
from engine.errors import CheckpointError
from engine.linear import SVDQuantLinear
from engine.models.catalogue import ModelSpec, resolve
from engine.quantize import made


@pytest.fixture
def shipped(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """The smallest FLUX as if it shipped, and an empty cache."""
    zoo = tmp_path / "zoo"
    shutil.copytree(model, zoo / "mini")
    monkeypatch.setenv("ENGINE_ZOO", str(zoo))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = resolve(str(zoo / "mini"))
    return replace(spec, checkpoints={"nvfp4": str(zoo / "mini-nvfp4")})


def test_it_is_made_once_and_paints(shipped: ModelSpec):
    told: list[str] = []
    assert shipped.makes("nvfp4")
    engine = Engine.load(shipped, "nvfp4", device="cpu", progress=told.append)
    assert any(words.startswith("making the NVFP4 weights of mini from its 16-bit ones, once, ") for words in told)
    layers = [layer for layer in engine.pipe.transformer.modules() if isinstance(layer, SVDQuantLinear)]
    assert {layer.packed.kind for layer in layers} == {"nvfp4"}
    assert engine.backend == "reference", "the path that these layers really take"
    result = engine.run(Request("a red cube", seed=1, steps=1, width=256, height=256))
    assert (result.precision, result.backend, result.image.size) == ("nvfp4", "reference", (256, 256))

    kept = [path for path in made.cache_folder().iterdir() if path.is_dir()]
    before = kept[0].stat().st_mtime_ns
    told.clear()
    assert made.nvfp4(shipped, told.append) == kept[0]
    assert told == []
    assert kept[0].stat().st_mtime_ns == before


def test_other_weights_get_one_of_their_own_and_one_that_ships_is_taken(shipped: ModelSpec):
    first = made.nvfp4(shipped)
    weights = next((Path(shipped.source) / "transformer").glob("*.safetensors"))
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights)
    second = made.nvfp4(shipped)
    assert first != second
    shutil.move(first, shipped.checkpoints["nvfp4"])
    shutil.rmtree(second)
    assert not shipped.makes("nvfp4")
    Engine.load(shipped, "nvfp4", device="cpu")
    assert not second.exists()


def test_a_cache_that_cannot_be_written_is_said(shipped: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.raises(CheckpointError, match=r"cannot be kept there .* another folder in XDG_CACHE_HOME"):
        made.nvfp4(shipped)
