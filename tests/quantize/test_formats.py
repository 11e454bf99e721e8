"""Straight to each layout: the file opens again and its layers give the same output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from engine.checkpoint.files import TensorFiles
from engine.checkpoint.layouts import detect, open_checkpoint
from engine.checkpoint.quantization import read_quantization
from engine.linear import SVDQuantLinear
from engine.models import flux
from engine.models.install import load_quantized
from engine.quantize import quantize_model
from engine.quantize.layer import Inputs, quantize_group
from engine.quantize.records import read_records, records_path
from tests.quantize.conftest import PROMPTS, QUICK, SMALL

FORMS = {
    "canonical": ("canonical", "canonical", "folder"),
    "canonical file": ("canonical", "canonical", "one.safetensors"),
    "nunchaku": ("nunchaku", "nunchaku", "svdq-int4_r16-mine.safetensors"),
    "nunchaku folder": ("nunchaku", "nunchaku_folder", "two-files"),
    "nunchaku_lite": ("nunchaku_lite", "nunchaku_lite", "lite"),
}


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for format, _, name in FORMS.values():
        quantize_model(str(model), root / name, prompts=PROMPTS, recipe=QUICK, format=format, **SMALL)  # pyright: ignore
    return {form: root / name for form, (_, _, name) in FORMS.items()}


def run(model: torch.nn.Module) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(1, 16, 64, generator=draw).bfloat16(),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=draw).bfloat16(),
            pooled_projections=torch.randn(1, 16, generator=draw).bfloat16(),
            timestep=torch.tensor([0.5]).bfloat16(),
            guidance=torch.tensor([3.0]),
            img_ids=ids,
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0].float()


def output(path: Path) -> torch.Tensor:
    cpu = torch.device("cpu")
    return run(load_quantized(path, FluxTransformer2DModel, flux, backend="reference", activation="w4a4", device=cpu))


@pytest.mark.parametrize("form", FORMS)
def test_it_opens_again_and_every_tensor_is_the_same(made: dict[str, Path], form: str):
    assert detect(made[form]).kind == FORMS[form][1]
    plain, other = open_checkpoint(made["canonical"]), open_checkpoint(made[form])
    ours = {name for name in other if not name.startswith("published.")}
    assert ours == set(plain)
    assert all(torch.equal(plain[name].float(), other[name].float()) for name in plain)
    assert read_quantization(other).rank == 16
    plain.close()
    other.close()


@pytest.mark.parametrize("form", FORMS)
def test_its_layers_give_the_same_output(made: dict[str, Path], form: str):
    assert torch.equal(output(made[form]), output(made["canonical"]))


def test_nothing_is_left_beside_the_outputs(made: dict[str, Path]):
    names = {path.name for path in made["canonical"].parent.iterdir()}
    files = [path for path in made.values() if path.suffix == ".safetensors"]
    assert names == {path.name for path in made.values()} | {records_path(path).name for path in files}


def test_the_figures_of_each_layer_lie_beside_it(made: dict[str, Path]):
    tables = [records_path(path).read_text() for path in made.values()]
    assert len(set(tables)) == 1
    records = read_records(records_path(made["nunchaku"]))
    assert len(records) == 15
    for record in records:
        assert record.error_w4a4 is not None
        assert record.error_w4a8 is not None
        assert record.naive_error is not None
        assert 0 < record.error_w4a8 <= record.error_w4a4 <= record.naive_error < 0.5, record


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_figures_are_those_of_the_running_layer(unsigned: bool):
    draw = torch.Generator().manual_seed(2)
    weight = torch.randn(192, 128, generator=draw) * 128**-0.5
    rows = (torch.randn(300, 128, generator=draw) * torch.linspace(0.1, 5, 128)).bfloat16().float()
    rows = torch.nn.functional.gelu(rows).bfloat16().float() if unsigned else rows
    found = quantize_group(weight, Inputs(rows, rows.abs().amax(0)), QUICK, unsigned=unsigned)
    exact = rows @ weight.T
    for activation, error in (("w4a4", found.error), ("w4a8", found.error_w4a8)):
        layer = SVDQuantLinear(
            found.linear, backend="reference", activation=activation, dtype=torch.bfloat16, unsigned_input=unsigned
        )
        running = float((layer(rows.bfloat16()).float() - exact).norm() / exact.norm())
        assert error == pytest.approx(running, rel=0.02)


def test_without_data_the_model_is_not_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr("engine.models.loading.pipeline", refuse)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", refuse)
    stages = []
    rows = quantize_model(str(model), tmp_path / "free.safetensors", recipe=QUICK, format="nunchaku", device="cpu",
                          progress=lambda stage, *_: stages.append(stage))  # fmt: skip
    assert set(stages) == {"quantizing", "writing"}
    assert len(rows) == 15
    assert {path.name for path in tmp_path.iterdir()} == {"free.safetensors"}
    monkeypatch.undo()
    exact = run(FluxTransformer2DModel.from_pretrained(model / "transformer", dtype=torch.bfloat16))
    assert float((output(tmp_path / "free.safetensors") - exact).norm() / exact.norm()) < 0.35


def test_figures_of_an_earlier_checkpoint_do_not_stay_beside_a_new_one(model: Path, tmp_path: Path):
    out = tmp_path / "one.safetensors"
    quantize_model(str(model), out, prompts=PROMPTS[:1], recipe=QUICK, **SMALL)  # pyright: ignore
    assert records_path(out).is_file()
    quantize_model(str(model), out, recipe=QUICK, device="cpu")
    assert not records_path(out).is_file()


def test_kept_linears_stay_in_16_bits_in_the_layouts_that_hold_them(model: Path, tmp_path: Path):
    for format in ("canonical", "nunchaku_lite"):
        out = tmp_path / format
        quantize_model(str(model), out, recipe=QUICK, keep=["*.proj_mlp"], format=format, device="cpu")  # pyright: ignore
        with open_checkpoint(out) as source:  # pyright: ignore
            assert "single_transformer_blocks.0.proj_mlp.weight" in source
            assert "single_transformer_blocks.0.proj_mlp.codes" not in source
    assert torch.equal(output(tmp_path / "canonical"), output(tmp_path / "nunchaku_lite"))


def test_nvfp4_in_nunchakus_layout_and_a_rank_of_zero(model: Path, tmp_path: Path):
    from dataclasses import replace

    for number, recipe in enumerate((replace(QUICK, precision="nvfp4"), replace(QUICK, rank=0))):
        for format, name in (("canonical", "plain"), ("nunchaku", "file.safetensors")):
            out = tmp_path / str(number) / name
            quantize_model(str(model), out, recipe=recipe, format=format, device="cpu")  # pyright: ignore
        assert torch.equal(
            output(tmp_path / str(number) / "plain"), output(tmp_path / str(number) / "file.safetensors")
        )


def test_a_canonical_folder_is_made_of_shards_that_hosts_take(model: Path, tmp_path: Path):
    quantize_model(str(model), tmp_path / "small", recipe=QUICK, device="cpu", max_shard_bytes=300_000)
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    with TensorFiles(tmp_path / "small") as files:
        assert set(index["weight_map"]) == set(files)
