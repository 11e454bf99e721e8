"""What a LoRA file may hold besides factors that fit: each is used, listed or refused, and none is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import CheckpointError, SVDQuantFluxTransformer, SVDQuantSanaTransformer
from engine.commands.convert_lora import main
from engine.lora import load_lora, read_lora, unload_lora
from engine.lora.convert import convert_lora
from engine.lora.weights import from_tensors
from tests.checkpoint.test_pretrained import flux_inputs, relative
from tests.lora.conftest import DATA, FLUX, LORA
from tests.lora.test_formats import pair

SANA = DATA / "sana_tiny_int4.safetensors"
BLOCK = "transformer.transformer_blocks.0"
KOHYA = ("lora_down", "lora_up")


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    return SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu")


@pytest.fixture(autouse=True)
def _clean(model: FluxTransformer2DModel):
    yield
    unload_lora(model)


def run(model: FluxTransformer2DModel) -> Tensor:
    with torch.inference_mode():
        return model(**flux_inputs(), return_dict=False)[0]


def saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


STRANGE = [
    f"{BLOCK}.attn.to_k.unheard_of",
    f"{BLOCK}.attn.to_q.base_layer.weight",
    "whatever.weight",
    "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm",
    "diffusion_model.double_blocks.0.img_attn.norm.query_norm.set_weight",
    "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight",
]


@pytest.mark.parametrize("key", STRANGE)
def test_keys_that_nothing_is_known_of_are_an_error_unless_told(
    model: FluxTransformer2DModel, tmp_path: Path, key: str
):
    path = saved(tmp_path, pair(f"{BLOCK}.attn.to_q") | {key: torch.ones(128)})
    before = run(model)
    with pytest.raises(CheckpointError, match="match nothing in the model") as caught:
        load_lora(model, path)
    assert key in str(caught.value)
    with pytest.raises(CheckpointError, match="match nothing in the model"):
        convert_lora(FLUX, path, tmp_path / "out.safetensors")
    assert torch.equal(run(model), before)
    assert load_lora(model, path, strict=False).unmatched == [key]
    assert convert_lora(FLUX, path, tmp_path / "out.safetensors", strict=False) == [key]


def test_keys_of_text_encoders_are_listed_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    te1, te2 = "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te2_encoder_block_0_layer_0_SelfAttention_k"
    tensors = pair("lora_unet_double_blocks_0_img_attn_proj", ends=KOHYA)
    path = saved(tmp_path, tensors | pair(te1, ends=KOHYA) | pair(te2, ends=KOHYA))
    assert main(["--quant-path", str(FLUX), "--lora-path", str(path), "--output-root", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert all(f"left out, not for the transformer: {name}.lora_down.weight" in told for name in (te1, te2))


def test_norms_in_diffusers_form_replace_those_of_the_model(model: FluxTransformer2DModel, tmp_path: Path):
    """diffusers' form of a BFL control LoRA, which our own `tensors` writes too."""
    native = pair("double_blocks.0.img_attn.qkv", 384)
    native["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.rand(128) + 0.5
    native["double_blocks.0.txt_attn.norm.key_norm.scale"] = torch.rand(128) + 0.5
    lora = from_tensors(native)
    again = read_lora(saved(tmp_path, lora.tensors()))
    assert again.norms.keys() == lora.norms.keys() == {
        "transformer_blocks.0.attn.norm_q", "transformer_blocks.0.attn.norm_added_k",
    }  # fmt: skip
    assert all(torch.equal(value, lora.norms[name]) for name, value in again.norms.items())
    before = run(model)
    load_lora(model, tmp_path / "lora.safetensors", name="control")
    changed = run(model)
    unload_lora(model)
    assert torch.equal(run(model), before)
    load_lora(model, lora, name="native")
    assert torch.equal(run(model), changed)


def test_a_norm_of_another_size_leaves_the_model_as_it_was(model: FluxTransformer2DModel, tmp_path: Path):
    native = pair("double_blocks.0.img_attn.qkv", 384)
    native["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(64)
    before = run(model)
    for use in (lambda lora: load_lora(model, lora), lambda lora: convert_lora(FLUX, lora, tmp_path / "o.safetensors")):
        with pytest.raises(CheckpointError, match=r"attn\.norm_q has 128 weights, but its LoRA 64"):
            use(from_tensors(native))
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("adapter", ["default", "default_0", "my-style"])
def test_names_of_adapters_do_not_matter(adapter: str):
    plain = pair(f"{BLOCK}.attn.to_q")
    named = {key.replace(".weight", f".{adapter}.weight"): value for key, value in plain.items()}
    named[f"{BLOCK}.attn.to_q.lora_B.{adapter}.bias"] = torch.arange(128.0)
    lora = from_tensors(named)
    assert lora.unknown == lora.left_out == []
    assert torch.equal(lora.factors["transformer_blocks.0.attn.to_q"].down, plain[f"{BLOCK}.attn.to_q.lora_A.weight"])
    assert torch.equal(lora.biases["transformer_blocks.0.attn.to_q"], torch.arange(128.0))


def test_a_third_factor_is_refused_and_one_of_a_text_encoder_is_not(tmp_path: Path):
    module = "lora_unet_double_blocks_0_img_attn_proj"
    tensors = pair(module, ends=KOHYA)
    with pytest.raises(CheckpointError, match="a LoCon in Tucker form"):
        from_tensors(tensors | {f"{module}.lora_mid.weight": torch.ones(2, 2, 1, 1)})
    lora = read_lora(saved(tmp_path, tensors | {"lora_te1_x.lokr_w1": torch.ones(2, 2)}))
    assert lora.left_out == ["lora_te1_x.lokr_w1"]


def test_a_checkpoint_is_no_lora(model: FluxTransformer2DModel):
    with pytest.raises(CheckpointError, match="expected a LoRA, found a 4-bit checkpoint"):
        load_lora(model, FLUX)


def test_nothing_is_written_of_a_lora_for_another_model(tmp_path: Path):
    lora = from_tensors(pair("transformer_blocks.0.attn1.to_q", 64, 64))
    with pytest.raises(CheckpointError, match="none of its modules is in the model"):
        convert_lora(FLUX, lora, tmp_path / "out.safetensors", strict=False)
    assert list(tmp_path.iterdir()) == []


def test_runtime_form_for_layers_that_a_model_lacks_is_an_error(model: FluxTransformer2DModel, tmp_path: Path):
    convert_lora(FLUX, LORA / "xlabs.safetensors", tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    far = {key.replace("blocks.0", "blocks.5"): value.clone() for key, value in tensors.items()}
    with pytest.raises(CheckpointError, match="match nothing in the model"):
        load_lora(model, saved(tmp_path, tensors | far))


def test_runtime_form_goes_onto_sana_as_the_lora_itself_does(tmp_path: Path):
    """The feed-forward's second linear is wider in the model than in the file: 160 inputs, filled up to 192."""
    sizes = {"attn1.to_q": (64, 64), "attn1.to_v": (64, 64), "attn2.to_k": (64, 64), "attn2.to_out.0": (64, 64)}
    sizes |= {"ff.conv_inverted": (320, 64), "ff.conv_point": (64, 160)}
    tensors = {}
    for name, (n, k) in sizes.items():
        own = pair(f"{BLOCK}.{name}", n, k)
        tensors |= {key: value[:, :, None, None] if "conv" in name else value for key, value in own.items()}
    path = saved(tmp_path, tensors)
    assert convert_lora(SANA, path, tmp_path / "runtime.safetensors") == []
    sana = SVDQuantSanaTransformer.from_pretrained(SANA, device="cpu")

    def go() -> Tensor:
        draw = torch.Generator().manual_seed(0)
        tokens, text = torch.randn(1, 8, 4, 4, generator=draw), torch.randn(1, 6, 32, generator=draw)
        with torch.inference_mode():
            return sana(tokens.bfloat16(), text.bfloat16(), torch.tensor([500.0]).bfloat16(), return_dict=False)[0]

    before = go()
    load_lora(sana, path, name="itself")
    wanted = go()
    unload_lora(sana)
    load_lora(sana, tmp_path / "runtime.safetensors")
    assert relative(before, wanted) > 0.02
    assert relative(go(), wanted) < 0.01
    unload_lora(sana)
    assert torch.equal(go(), before)
