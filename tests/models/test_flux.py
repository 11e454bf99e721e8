"""FLUX with replaced leaves: same function where nothing is rounded, close to it where weights are 4-bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from engine.checkpoint.files import write_shards
from engine.errors import CheckpointError
from engine.linear import AWQLinear, SVDQuantLinear
from engine.models import flux
from engine.models.install import Quantization, load_quantized
from engine.quantize.block import quantize_linears
from engine.quantize.layer import Recipe
from tests.models.conftest import flux_inputs, small_flux

RANK = 16
CPU = torch.device("cpu")


def quantized_folder(folder: Path, keep: tuple[str, ...] = ()) -> Path:
    model = flux.prepare(small_flux())
    groups = flux.plan(model)
    tensors = dict(model.state_dict())
    from engine.models.install import is_kept

    for group in groups:
        if not is_kept(group, keep):
            quantize_linears(model, group, None, Recipe(rank=RANK, rounds=2, alphas=()), tensors)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    metadata = Quantization("FluxTransformer2DModel", config, "int4", 64, RANK, keep).metadata()
    write_shards(folder, tensors, metadata, max_bytes=300_000)
    return folder


def load(folder: Path, activation: str = "w4a8", backend: str = "reference") -> torch.nn.Module:
    return load_quantized(folder, FluxTransformer2DModel, flux, backend=backend, activation=activation, device=CPU)  # pyright: ignore


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_folder(tmp_path_factory.mktemp("int4") / "model")


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(**flux_inputs(), return_dict=False)[0].float()


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def test_splitting_proj_out_keeps_the_function():
    plain, split = small_flux(), flux.prepare(small_flux())
    assert relative(run(split), run(plain)) < 0.01


def test_every_linear_of_a_block_is_planned_once(flux_model: FluxTransformer2DModel):
    flux.prepare(flux_model)
    planned = [name for group in flux.plan(flux_model) for name in group.names]
    in_blocks = [
        name
        for name, module in flux_model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("transformer_blocks", "single_transformer_blocks"))
    ]
    assert sorted(planned) == sorted(in_blocks)
    assert len(planned) == len(set(planned))


@pytest.mark.parametrize(("activation", "limit"), [("w4a8", 0.25), ("w4a4", 0.35)])
def test_int4_stays_near_bf16(folder: Path, activation: str, limit: float):
    exact = run(small_flux())
    assert 0 < relative(run(load(folder, activation)), exact) < limit


def test_eight_bit_activations_are_nearer_than_four_bit(folder: Path):
    exact = run(small_flux())
    assert relative(run(load(folder, "w4a8")), exact) < relative(run(load(folder, "w4a4")), exact)


def test_leaves_are_replaced_and_qkv_is_one_layer(folder: Path):
    model = load(folder)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["transformer_blocks.0.attn.to_qkv"] is SVDQuantLinear
    assert kinds["transformer_blocks.0.norm1.linear"] is AWQLinear
    assert kinds["single_transformer_blocks.0.proj_out.mlp"] is SVDQuantLinear
    assert not any(name.endswith("to_q") for name in kinds)


def test_runs_are_bit_identical(folder: Path):
    assert torch.equal(run(load(folder)), run(load(folder)))


def test_kept_layers_stay_in_16_bits_even_inside_a_fused_pair(tmp_path: Path):
    kept = quantized_folder(tmp_path / "kept", keep=("*.norm*.linear", "transformer_blocks.*.attn.add_*"))
    model = load(kept)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["transformer_blocks.0.norm1.linear"] is torch.nn.Linear
    assert kinds["transformer_blocks.0.attn.to_added_qkv"] is torch.nn.Linear
    assert relative(run(model), run(small_flux())) < 0.25


def test_a_missing_and_an_unexpected_key_are_named(folder: Path, tmp_path: Path):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    metadata = _metadata(folder)
    tensors["stray.weight"] = tensors.pop("proj_out.weight")
    write_shards(tmp_path / "odd", tensors, metadata, 10**9)
    with pytest.raises(CheckpointError, match=r"1 missing \(proj_out.weight\); 1 unexpected \(stray.weight\)"):
        load(tmp_path / "odd")


def test_a_wrong_shape_is_named(folder: Path, tmp_path: Path):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    name = "transformer_blocks.0.attn.to_out.0.wscales"
    tensors[name] = tensors[name][:, :1].contiguous()
    write_shards(tmp_path / "odd", tensors, _metadata(folder), 10**9)
    with pytest.raises(CheckpointError, match=r"to_out.0.wscales has shape \(128, 1\), expected \(128, 2\)"):
        load(tmp_path / "odd")


def test_nan_scales_are_refused(folder: Path, tmp_path: Path):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    tensors["single_transformer_blocks.0.proj_mlp.wscales"][3, 1] = float("nan")
    write_shards(tmp_path / "odd", tensors, _metadata(folder), 10**9)
    with pytest.raises(CheckpointError, match=r"proj_mlp\.wscales holds NaN"):
        load(tmp_path / "odd")


def test_a_truncated_file_is_refused(folder: Path, tmp_path: Path):
    file = next(folder.glob("*.safetensors"))
    short = tmp_path / "short.safetensors"
    short.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(short)


def test_a_lost_shard_is_named(folder: Path, tmp_path: Path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    first = sorted(copy.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(CheckpointError, match=first.name):
        load(copy)


def test_plain_16_bit_weights_are_refused_with_advice(tmp_path: Path):
    file = tmp_path / "plain.safetensors"
    save_file({"weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="--precision bf16"):
        load(file)


def _metadata(folder: Path) -> dict[str, str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return {key: value for key, value in index["metadata"].items() if key != "total_size"}
