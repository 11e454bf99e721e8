"""One LoRA written in every spelling there is comes down to the same deltas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import CheckpointError
from engine.lora import read_lora
from engine.lora.weights import Factors, LoraWeights, from_tensors

D, R = 64, 6
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.3"
# BFL module -> diffusers modules, rows of each, inputs
FUSED = {
    "double_blocks.0.img_attn.qkv": ([f"{DOUBLE}.attn.to_{x}" for x in "qkv"], D, D),
    "double_blocks.0.txt_attn.qkv": ([f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"], D, D),
    "double_blocks.0.img_attn.proj": ([f"{DOUBLE}.attn.to_out.0"], D, D),
    "double_blocks.0.txt_attn.proj": ([f"{DOUBLE}.attn.to_add_out"], D, D),
    "double_blocks.0.img_mlp.0": ([f"{DOUBLE}.ff.net.0.proj"], 4 * D, D),
    "double_blocks.0.img_mlp.2": ([f"{DOUBLE}.ff.net.2"], D, 4 * D),
    "double_blocks.0.txt_mlp.0": ([f"{DOUBLE}.ff_context.net.0.proj"], 4 * D, D),
    "double_blocks.0.txt_mlp.2": ([f"{DOUBLE}.ff_context.net.2"], D, 4 * D),
    "double_blocks.0.img_mod.lin": ([f"{DOUBLE}.norm1.linear"], 6 * D, D),
    "double_blocks.0.txt_mod.lin": ([f"{DOUBLE}.norm1_context.linear"], 6 * D, D),
    "single_blocks.3.linear2": ([f"{SINGLE}.proj_out"], D, 5 * D),
    "single_blocks.3.modulation.lin": ([f"{SINGLE}.norm.linear"], 3 * D, D),
    "img_in": (["x_embedder"], D, 16),
    "txt_in": (["context_embedder"], D, 32),
    "time_in.in_layer": (["time_text_embed.timestep_embedder.linear_1"], D, 256),
    "vector_in.out_layer": (["time_text_embed.text_embedder.linear_2"], D, D),
    "guidance_in.in_layer": (["time_text_embed.guidance_embedder.linear_1"], D, 256),
    "final_layer.linear": (["proj_out"], 16, D),
}
ATTENTION = [name for name in FUSED if "attn" in name]


def bfl_lora(dtype: torch.dtype, names: list[str]) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Factors by BFL module, and the dense deltas (alpha = R) that they mean by diffusers module."""
    torch.manual_seed(5)
    factors, deltas = {}, {}
    for name in names:
        modules, rows, k = FUSED[name]
        down, up = torch.randn(R, k).to(dtype), torch.randn(rows * len(modules), R).to(dtype)
        factors[name] = Factors(down, up)
        for module, part in zip(modules, up.double().split(rows), strict=True):
            deltas[module] = part @ down.double()
    return factors, deltas


def split(factors: dict[str, Factors]) -> dict[str, Factors]:
    """The same by diffusers module."""
    return {
        module: Factors(down, part.contiguous())
        for name, (down, up) in factors.items()
        for module, part in zip(FUSED[name][0], up.split(FUSED[name][1]), strict=True)
    }


def spelled(factors: dict[str, Factors], name: Callable[[str], str], ends: tuple[str, str]) -> dict[str, Tensor]:
    return {
        f"{name(module)}.{end}": value
        for module, pair in factors.items()
        for end, value in zip(ends, pair, strict=True)
    }


AB, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# dialect -> (whether keys are BFL's, spelling of a module, ends of the two keys)
DIALECTS: dict[str, tuple[bool, Callable[[str], str], tuple[str, str]]] = {
    "diffusers": (False, lambda m: f"transformer.{m}", AB),
    "no prefix": (False, lambda m: m, AB),
    "peft in memory": (False, lambda m: f"transformer.{m}", ("lora_A.default.weight", "lora_B.default.weight")),
    "old diffusers": (False, lambda m: f"transformer.{m}", ("lora.down.weight", "lora.up.weight")),
    "peft": (False, lambda m: f"base_model.model.{m}", AB),
    "peft of a pipeline": (False, lambda m: f"base_model.model.transformer.{m}", AB),
    "kohya, diffusers names": (False, lambda m: "lora_transformer_" + m.replace(".", "_"), KOHYA),
    "kohya, lora_unet": (False, lambda m: "lora_unet_" + m.replace(".", "_"), KOHYA),
    "lycoris": (False, lambda m: "lycoris_" + m.replace(".", "_"), KOHYA),
    "kohya": (True, lambda m: "lora_unet_" + m.replace(".", "_"), KOHYA),
    "comfyui": (True, lambda m: f"diffusion_model.{m}", KOHYA),
    "comfyui, whole model": (True, lambda m: f"model.diffusion_model.{m}", KOHYA),
    "ai-toolkit": (True, lambda m: f"diffusion_model.{m}", AB),
    "fal": (True, lambda m: f"base_model.model.{m}", AB),
    "bfl": (True, lambda m: m, AB),
}


def assert_means(lora: LoraWeights, deltas: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert lora.factors.keys() == deltas.keys()
    for name, delta in deltas.items():
        found = lora.factors[name].up.double() @ lora.factors[name].down.double()
        assert float((found - delta).norm()) <= tolerance * float(delta.norm()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_spelling_means_the_same(dialect: str, dtype: torch.dtype):
    bfl, name, ends = DIALECTS[dialect]
    factors, deltas = bfl_lora(dtype, list(FUSED))
    tensors = spelled(factors if bfl else split(factors), name, ends)
    lora = from_tensors(tensors)
    assert lora.left_out == []
    assert_means(lora, deltas)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_means_the_same(prefix: str):
    factors, deltas = bfl_lora(torch.float32, [name for name in ATTENTION if "double" in name])
    names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2"}
    names |= {"img_attn.proj": "proj_lora1", "txt_attn.proj": "proj_lora2"}
    tensors = {}
    for module, (down, up) in factors.items():
        block, leaf = module.split(".", 2)[1], module.split(".", 2)[2]
        start = f"{prefix}double_blocks.{block}.processor.{names[leaf]}"
        tensors |= {f"{start}.down.weight": down, f"{start}.up.weight": up}
    assert_means(from_tensors(tensors), deltas)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 24.0, -3.0])
@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "comfyui", "kohya, diffusers names"])
def test_alphas_scale_where_there_are_any(dialect: str, alpha: float):
    bfl, name, ends = DIALECTS[dialect]
    factors, deltas = bfl_lora(torch.float32, list(FUSED))
    own = factors if bfl else split(factors)
    tensors = spelled(own, name, ends)
    scaled = list(own)[::2]  # the others have none, which means alpha = rank
    tensors |= {f"{name(module)}.alpha": torch.tensor(alpha) for module in scaled}
    modules = {part for module in scaled for part in (FUSED[module][0] if bfl else [module])}
    wanted = {module: delta * (alpha / R if module in modules else 1) for module, delta in deltas.items()}
    assert_means(from_tensors(tensors), wanted, 1e-5)


def test_an_alpha_of_zero_means_nothing_is_added():
    factors, _ = bfl_lora(torch.float32, ["img_in"])
    tensors = spelled(factors, lambda m: f"lora_unet_{m}", KOHYA) | {"lora_unet_img_in.alpha": torch.tensor(0.0)}
    assert not bool(from_tensors(tensors).factors["x_embedder"].down.any())


def with_metadata(tmp_path: Path, config: dict, prefix: str = "transformer.") -> Path:
    factors, _ = bfl_lora(torch.float32, ["img_in", "txt_in", "double_blocks.0.img_attn.proj"])
    tensors = spelled(split(factors), lambda m: f"transformer.{m}", AB)
    text = json.dumps({prefix + key: value for key, value in config.items()})
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text, "format": "pt"})
    return tmp_path / "lora.safetensors"


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_alphas_and_patterns_in_the_metadata_of_diffusers(tmp_path: Path, prefix: str, root: bool):
    patterns = {"x_embedder": 12, r"attn\.to_out\.0": 1.5}
    config = {"r": R, "lora_alpha": 3, "alpha_pattern": patterns, "rank_pattern": {}, "use_rslora": root}
    lora = read_lora(with_metadata(tmp_path, config, prefix))
    _, deltas = bfl_lora(torch.float32, ["img_in", "txt_in", "double_blocks.0.img_attn.proj"])
    by = R**0.5 if root else R
    scales = {"x_embedder": 12 / by, "context_embedder": 3 / by, f"{DOUBLE}.attn.to_out.0": 1.5 / by}
    assert_means(lora, {name: delta * scales[name] for name, delta in deltas.items()})


def test_the_configuration_beside_a_file_of_peft(tmp_path: Path):
    factors, deltas = bfl_lora(torch.float32, ["img_in"])
    save_file(spelled(split(factors), lambda m: f"base_model.model.{m}", AB), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": R, "lora_alpha": 2 * R}))
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert_means(read_lora(place), {"x_embedder": 2 * deltas["x_embedder"]})


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"lora_alpha": "much"}, "lora_alpha: expected a number"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "expected a JSON object"),
    ],
)
def test_a_damaged_configuration_is_named(tmp_path: Path, config: dict, sentence: str):
    with pytest.raises(CheckpointError, match=sentence):
        read_lora(with_metadata(tmp_path, config))


def test_unrelated_metadata_does_not_matter(tmp_path: Path):
    factors, deltas = bfl_lora(torch.bfloat16, ["img_in"])
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "64", "modelspec.title": "ü", "sshs_model_hash": "0"}
    save_file(spelled(factors, lambda m: f"lora_unet_{m}", KOHYA), tmp_path / "a.safetensors", metadata=metadata)
    assert_means(read_lora(tmp_path / "a.safetensors"), deltas)


@pytest.mark.parametrize(
    "key", ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoders.clip_l.transformer.x", "text_encoder_2.wo"]
)
def test_keys_of_text_encoders_are_listed_and_left_out(key: str):
    factors, deltas = bfl_lora(torch.float32, list(FUSED))
    tensors = spelled(factors, lambda m: "lora_unet_" + m.replace(".", "_"), KOHYA)
    more = {f"{key}.{end}": torch.randn(4, 4) for end in KOHYA} | {f"{key}.alpha": torch.tensor(2.0)}
    lora = from_tensors(tensors | more)
    assert sorted(lora.left_out) == sorted(more)
    assert_means(lora, deltas)


def test_dense_differences_are_listed_and_left_out():
    factors, deltas = bfl_lora(torch.float32, ["img_in"])
    tensors = spelled(factors, lambda m: f"diffusion_model.{m}", KOHYA)
    more = {"diffusion_model.img_in.diff_b": torch.ones(D), "diffusion_model.txt_in.diff": torch.ones(D, 32)}
    lora = from_tensors(tensors | more)
    assert sorted(lora.left_out) == sorted(more)
    assert_means(lora, deltas)
