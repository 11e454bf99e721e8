"""The table of models: which precisions a model has, and which are run unless others are asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine import Engine
from engine.errors import CheckpointError
from engine.models.catalogue import CATALOGUE, resolve, zoo_folder


@pytest.mark.parametrize("name", CATALOGUE)
def test_nvfp4_is_there_for_who_asks(name: str):
    spec = resolve(name)
    # No NVFP4 file of the large SANA is published under a name that is known here.
    assert spec.precisions == (("bf16", "int4") if name == "sana-1.6b" else ("bf16", "int4", "nvfp4"))
    assert spec.usual == ("bf16", "int4")


def test_published_names():
    assert (
        resolve("dev").checkpoints["nvfp4"] == "nunchaku-tech/nunchaku-flux.1-dev/svdq-fp4_r32-flux.1-dev.safetensors"
    )
    assert resolve("sana").checkpoints["int4"].endswith("/svdq-int4_r32-sana1.6b.safetensors")


def test_a_folder_has_what_lies_beside_it(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert resolve(str(folder)).precisions == ("bf16",)
    (tmp_path / "mine-nvfp4").mkdir()
    assert resolve(str(folder)).usual == ("bf16", "nvfp4")
    (tmp_path / "mine-int4").mkdir()
    assert resolve(str(folder)).usual == ("bf16", "int4")
    assert resolve(str(folder)).checkpoints["nvfp4"] == str(tmp_path / "mine-nvfp4")


def test_a_checkpoint_that_is_not_there_says_how_to_make_it(tmp_path: Path):
    source = tmp_path / "mine"
    shutil.copytree(zoo_folder() / "flux-tiny", source, copy_function=lambda a, b: Path(b).symlink_to(a))
    spec = replace(resolve("tiny"), source=str(source), checkpoints={"nvfp4": str(tmp_path / "mine-nvfp4")})
    assert not spec.makes("nvfp4"), "only of what ships"
    with pytest.raises(CheckpointError, match=rf"make it with python -m engine.quantize {source} --precision nvfp4"):
        Engine.load(spec, "nvfp4", device="cpu")
