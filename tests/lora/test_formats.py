"""Every LoRA format comes down to the same factors by diffusers module name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.lora import detect_format, read_lora
from engine.lora.weights import from_tensors
from tests.lora.conftest import LORA


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("kohya_bfl", "comfyui"),
        ("xlabs", "xlabs"),
        ("kohya_diffusers_names", "kohya_diffusers"),
        ("peft_bfl", "peft_bfl"),
    ],
)
def test_formats_of_the_vectors(name: str, form: str):
    tensors = load_file(LORA / f"{name}.safetensors")
    assert detect_format(tensors) == form
    found = read_lora(LORA / f"{name}.safetensors").tensors()
    assert_same(found, load_file(LORA / f"{name}.to_diffusers.safetensors"))


def test_diffusers_keys_stay_and_alpha_is_multiplied_in():
    tensors = load_file(LORA / "diffusers.safetensors")
    assert detect_format(tensors) == "diffusers"
    found = read_lora(LORA / "diffusers.safetensors").tensors()
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    alpha = tensors.pop(f"{name}.alpha")
    tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"] * float(alpha / 2)
    assert_same(found, tensors)


def test_comfyui_dots_mean_the_same_as_underscores():
    flat = load_file(LORA / "kohya_bfl.safetensors")
    dotted = json.loads((LORA / "comfyui_keys.json").read_text())
    renamed = {key: flat["lora_unet_" + _flat(key.removeprefix("diffusion_model."))] for key in dotted}
    assert len(renamed) == len(flat)
    assert_same(from_tensors(renamed).tensors(), load_file(LORA / "kohya_bfl.to_diffusers.safetensors"))


def _flat(key: str) -> str:
    for suffix in (".lora_down.weight", ".lora_up.weight", ".alpha"):
        if key.endswith(suffix):
            return key.removesuffix(suffix).replace(".", "_") + suffix
    raise AssertionError(key)


def pair(
    module: str, n: int = 128, k: int = 128, r: int = 2, ends: tuple[str, str] = ("lora_A", "lora_B")
) -> dict[str, Tensor]:
    torch.manual_seed(len(module))
    return {f"{module}.{ends[0]}.weight": torch.randn(r, k), f"{module}.{ends[1]}.weight": torch.randn(n, r)}


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "base_model.model."])
def test_prefixes_may_be_there_or_not(prefix: str):
    lora = from_tensors(pair(f"{prefix}transformer_blocks.0.attn.to_q"))
    assert list(lora.factors) == ["transformer_blocks.0.attn.to_q"]


def test_bfl_control_lora_has_biases_and_norms():
    tensors = pair("double_blocks.0.img_attn.qkv", 384) | pair("final_layer.adaLN_modulation.1", 256)
    tensors["double_blocks.0.img_attn.qkv.lora_B.bias"] = torch.arange(384.0)
    tensors["final_layer.adaLN_modulation.1.lora_B.bias"] = torch.arange(256.0)
    tensors["double_blocks.0.txt_attn.norm.key_norm.scale"] = torch.ones(128)
    tensors["double_blocks.0.txt_attn.norm.query_norm.scale"] = torch.zeros(128)
    assert detect_format(tensors) == "bfl"
    lora = from_tensors(tensors)
    assert torch.equal(lora.biases["transformer_blocks.0.attn.to_k"], torch.arange(128.0, 256.0))
    assert torch.equal(lora.biases["norm_out.linear"], torch.arange(256.0).roll(128))
    up = tensors["final_layer.adaLN_modulation.1.lora_B.weight"]
    assert torch.equal(lora.factors["norm_out.linear"].up, up.roll(128, 0))
    assert torch.equal(lora.norms["transformer_blocks.0.attn.norm_added_k"], torch.ones(128))
    assert torch.equal(lora.norms["transformer_blocks.0.attn.norm_added_q"], torch.zeros(128))


def test_linear1_splits_by_its_own_width():
    lora = from_tensors(pair("lora_unet_single_blocks_3_linear1", 7 * 64, 64, ends=("lora_down", "lora_up")))
    shapes = {name.rpartition("3.")[2]: tuple(f.up.shape) for name, f in lora.factors.items()}
    assert shapes == {"attn.to_q": (64, 2), "attn.to_k": (64, 2), "attn.to_v": (64, 2), "proj_mlp": (256, 2)}


def test_text_encoder_keys_are_left_out_and_listed():
    tensors = pair("transformer.transformer_blocks.0.attn.to_q") | pair("text_encoder.text_model.layers.0.q_proj")
    lora = from_tensors(tensors)
    assert len(lora.factors) == 1
    assert all("text_encoder" in key for key in lora.left_out)
    assert len(lora.left_out) == 2


def test_8_bit_factors_become_16_bit():
    tensors = {key: value.to(torch.float8_e4m3fn) for key, value in pair("transformer_blocks.0.attn.to_q").items()}
    lora = from_tensors(tensors)
    assert lora.factors["transformer_blocks.0.attn.to_q"].down.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("lora_unet_single_blocks_0_linear1.lokr_w1", "a LoKr"),
        ("transformer_blocks.0.attn.to_q.lora_magnitude_vector", "a DoRA"),
        ("lora_unet_single_blocks_0_linear1.dora_scale", "a DoRA"),
        ("lora_unet_single_blocks_0_linear1.hada_w1_a", "a LoHa"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, key: str, sentence: str):
    file = tmp_path / "other.safetensors"
    save_file({key: torch.ones(2), **pair("transformer_blocks.0.attn.to_k")}, file)
    with pytest.raises(CheckpointError, match=sentence):
        read_lora(file)


def test_damage_is_named(tmp_path: Path):
    module = "transformer_blocks.0.attn.to_q"
    half = pair(module)
    del half[f"{module}.lora_B.weight"]
    with pytest.raises(CheckpointError, match="only one of its two factors"):
        from_tensors(half, "diffusers")
    odd = pair(module)
    odd[f"{module}.lora_B.weight"] = torch.ones(128, 3)
    with pytest.raises(CheckpointError, match="do not multiply"):
        from_tensors(odd)
    nan = pair(module)
    nan[f"{module}.lora_A.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        from_tensors(nan)
    with pytest.raises(CheckpointError, match="expected a LoRA"):
        from_tensors({"weight": torch.ones(2)})
    pickled = tmp_path / "lora.pt"
    pickled.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match="no other kind is ever loaded"):
        read_lora(pickled)
