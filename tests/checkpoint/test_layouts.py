"""Published checkpoints against what they are known to hold, and through every layout and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.layouts import detect, open_checkpoint
from engine.checkpoint.nunchaku_flux import BLOCKS
from engine.checkpoint.pieces import same_bits
from engine.checkpoint.translate import convert
from engine.errors import CheckpointError
from tests.checkpoint.conftest import DATA, vectors

FLUX = DATA / "flux_tiny_int4.safetensors"
SANA = DATA / "sana_tiny_int4.safetensors"
# runtime prefix -> diffusers modules whose rows it stacks
RUNTIME = {
    "qkv_proj": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "qkv_proj_context": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "out_proj": ("attn.to_out.0",),
    "out_proj_context": ("attn.to_add_out",),
    "mlp_fc1": ("ff.net.0.proj",),
    "mlp_fc2": ("ff.net.2",),
    "mlp_context_fc1": ("ff_context.net.0.proj",),
    "mlp_context_fc2": ("ff_context.net.2",),
}
SINGLE = {"mlp_fc1": ("proj_mlp",), "mlp_fc2": ("proj_out.mlp",), "out_proj": ("proj_out.attn",)}


def read(path: Path) -> dict[str, Tensor]:
    source = open_checkpoint(path)
    try:
        return {name: source[name].clone() for name in source}
    finally:
        source.close()


def files(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return load_file(path)
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not same_bits(left[name], right[name])] == []


@pytest.fixture(scope="session")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvfp4") / "legacy"
    shutil.copytree(DATA / "flux_tiny_nvfp4_legacy", folder)
    (folder / "expected.safetensors").unlink()
    rest = {name: tensor for name, tensor in vectors("flux_tiny_int4").items() if not name.startswith(BLOCKS)}
    save_file(rest, folder / "unquantized_layers.safetensors")
    return folder


@pytest.fixture(params=["flux", "sana", "nvfp4"])
def published(request: pytest.FixtureRequest, nvfp4: Path) -> Path:
    return {"flux": FLUX, "sana": SANA, "nvfp4": nvfp4}[request.param]


def check_flux(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        block, prefix, part = _split(name)
        if part == "bias_dense" or (part == "smooth_orig" and same_bits(value, expected[f"{block}.{prefix}.smooth"])):
            continue
        if prefix.startswith("norm_"):
            assert same_bits(found[f"{block}.attn.{prefix}.{part}"], value), name
        elif prefix.startswith("norm"):
            check_modulation(found, f"{block}.{prefix}", part, value, expected)
        elif part != "bias":
            modules = (SINGLE if block.startswith("single") else {}).get(prefix) or RUNTIME[prefix]
            parts = [found[f"{block}.{module}.{part}"] for module in modules]
            if part in ("smooth", "lora_down", "wtscale"):
                assert all(same_bits(one, value) for one in parts), name
            else:
                whole = torch.cat([one.view(torch.uint8) if one.element_size() == 1 else one for one in parts])
                assert same_bits(whole.view(value.dtype), value), name


def check_modulation(
    found: dict[str, Tensor], module: str, part: str, value: Tensor, expected: dict[str, Tensor]
) -> None:
    chunks = value.shape[0] // expected_width(found, module)
    by_chunk = value.view(-1, chunks, *value.shape[1:]).transpose(0, 1).reshape(value.shape)
    if part == "bias":
        dense = expected[f"{module}.bias_dense"]
        assert torch.allclose(found[f"{module}.bias"], dense.float(), atol=2**-8)
    else:
        assert same_bits(found[f"{module}.{part}"], by_chunk), (module, part)


def expected_width(found: dict[str, Tensor], module: str) -> int:
    return found[f"{module}.codes"].shape[1] * 2


def _split(name: str) -> tuple[str, str, str]:
    *block, prefix, part = name.split(".")
    if prefix == "linear":
        prefix = f"{block.pop()}.{prefix}"
    return ".".join(block), prefix, part


def test_flux_int4_holds_what_is_expected():
    assert detect(FLUX).kind == "nunchaku"
    check_flux(read(FLUX), vectors("flux_tiny_int4_expected"))


def test_flux_nvfp4_folder_holds_what_is_expected(nvfp4: Path):
    assert detect(nvfp4).kind == "nunchaku_folder"
    check_flux(read(nvfp4), vectors("flux_tiny_nvfp4_legacy/expected"))


def test_sana_holds_what_is_expected():
    found = read(SANA)
    assert detect(SANA).model_class == "SanaTransformer2DModel"
    for name, value in vectors("sana_tiny_int4_expected").items():
        assert same_bits(found[name], value), name


def test_gelu_shift_is_taken_out_up_to_what_rounding_hid():
    """The stored shift was summed over the unrounded residual, ours over the codes: quantization lies between."""
    found, expected = read(FLUX), vectors("flux_tiny_int4_expected")
    for module, prefix in (("ff.net.2", "mlp_fc2"), ("ff_context.net.2", "mlp_context_fc2")):
        bias = found[f"transformer_blocks.0.{module}.bias"]
        stored = expected[f"transformer_blocks.0.{prefix}.bias"].float()
        dense = expected[f"transformer_blocks.0.{prefix}.bias_dense"].float()
        assert float((bias - dense).abs().max()) < 0.08
        assert float((bias - dense).norm()) < 0.25 * float((stored - dense).norm())


def test_canonical_and_back_gives_the_published_bytes(published: Path, tmp_path: Path):
    convert(published, tmp_path / "canonical", "canonical")
    back = tmp_path / "back.safetensors"
    convert(tmp_path / "canonical", back, "nunchaku")
    assert_same(files(back), files(published))
    assert_same(read(back), read(published))


def test_both_published_forms_hold_the_same(published: Path, tmp_path: Path):
    convert(published, tmp_path / "one.safetensors", "nunchaku")
    convert(tmp_path / "one.safetensors", tmp_path / "two", "nunchaku")
    assert_same(files(tmp_path / "two"), files(published))
    assert (tmp_path / "two" / "config.json").is_file()


def test_canonical_with_own_biases_survives_the_published_form(published: Path, tmp_path: Path):
    """A checkpoint that was quantized here has 16-bit biases, of which the published form drops bits."""
    convert(published, tmp_path / "a.safetensors", "canonical")
    tensors = {name: value for name, value in load_file(tmp_path / "a.safetensors").items() if "published." not in name}
    for name in tensors:
        if name.endswith(".bias"):
            tensors[name] = (torch.randn(tensors[name].shape) * 0.3).bfloat16()
    save_file(tensors, tmp_path / "b.safetensors", metadata=safe_open(tmp_path / "a.safetensors", "pt").metadata())
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "nunchaku")
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "canonical")
    assert_same(load_file(tmp_path / "d.safetensors"), tensors)


def test_a_metadata_bias_that_no_longer_fits_is_ignored(tmp_path: Path):
    convert(FLUX, tmp_path / "a.safetensors", "nunchaku")
    name = "transformer_blocks.0.norm1.linear.bias"
    with safe_open(tmp_path / "a.safetensors", "pt") as handle:
        metadata = handle.metadata()
    from engine.checkpoint import exact

    metadata |= exact.write({name: exact.Exact(torch.full((768,), 5.0))})
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata=metadata)
    assert_same(read(tmp_path / "b.safetensors"), read(FLUX))


def test_odd_padding_is_kept_on_record(tmp_path: Path):
    tensors = load_file(SANA)
    name = "transformer_blocks.0.cross_attn.q_linear"
    tensors[f"{name}.bias"][-1] = 7.0
    tensors[f"{name}.wscales"][-1, -1] = 3.0
    del tensors[f"{name}.smooth_orig"]
    save_file(tensors, tmp_path / "odd.safetensors", metadata=safe_open(SANA, "pt").metadata())
    convert(tmp_path / "odd.safetensors", tmp_path / "canonical", "canonical")
    convert(tmp_path / "canonical", tmp_path / "back.safetensors", "nunchaku")
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)


def test_lite_and_back(tmp_path: Path):
    convert(FLUX, tmp_path / "lite", "nunchaku_lite")
    assert detect(tmp_path / "lite").kind == "nunchaku_lite"
    section = json.loads((tmp_path / "lite" / "config.json").read_text())["quantization_config"]
    assert section["svdq_w4a4"]["rank"] == 32
    assert "single_transformer_blocks.0.proj_out" in section["svdq_w4a4"]["targets"]
    assert "transformer_blocks.0.norm1.linear" in section["awq_w4a16"]["targets"]
    convert(tmp_path / "lite", tmp_path / "back.safetensors", "canonical")
    assert_same(read(tmp_path / "back.safetensors"), read(FLUX))
    stored = files(tmp_path / "lite")
    convert(tmp_path / "back.safetensors", tmp_path / "again", "nunchaku_lite")
    assert_same(files(tmp_path / "again"), stored)


def test_lite_refuses_what_it_cannot_hold(tmp_path: Path, nvfp4: Path):
    with pytest.raises(CheckpointError, match="does not pad"):
        convert(SANA, tmp_path / "lite", "nunchaku_lite")
    with pytest.raises(CheckpointError, match="different wtscale"):
        convert(nvfp4, tmp_path / "lite", "nunchaku_lite")
    assert list(tmp_path.iterdir()) == []


def test_t5_file_holds_what_is_expected_and_comes_back(tmp_path: Path):
    stored = {}
    for case, name in (
        ("a", "encoder.block.0.layer.0.SelfAttention.q"),
        ("b", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ):
        for part in ("qweight", "scales", "scaled_zeros"):
            stored[f"{name}.{part}"] = vectors("pack_t5_awq")[f"{case}.{part}"]
    stored["encoder.final_layer_norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    path = tmp_path / "t5.safetensors"
    save_file(stored, path, metadata={"config": json.dumps({"d_model": 64})})
    assert detect(path).kind == "t5_awq"
    found = read(path)
    for case, name in (
        ("a", "encoder.block.0.layer.0.SelfAttention.q"),
        ("b", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ):
        codes = vectors("pack_t5_awq")[f"{case}.plain.codes"]
        assert same_bits(found[f"{name}.codes"], codes[:, 0::2] | (codes[:, 1::2] << 4))
        assert same_bits(found[f"{name}.scales"], vectors("pack_t5_awq")[f"{case}.plain.scales"])
        assert same_bits(found[f"{name}.zeros"], vectors("pack_t5_awq")[f"{case}.plain.zeros"])
    convert(path, tmp_path / "canonical", "canonical")
    convert(tmp_path / "canonical", tmp_path / "back.safetensors", "nunchaku")
    assert_same(load_file(tmp_path / "back.safetensors"), stored)


def test_a_legacy_folder_is_its_two_files_whatever_else_lies_there(nvfp4: Path, tmp_path: Path):
    shutil.copytree(nvfp4, tmp_path / "more")
    shutil.copy(DATA / "flux_tiny_nvfp4_legacy" / "expected.safetensors", tmp_path / "more")
    assert_same(read(tmp_path / "more"), read(nvfp4))
    (tmp_path / "more" / "unquantized_layers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"unquantized_layers\.safetensors is missing, the other half"):
        open_checkpoint(tmp_path / "more")
    with pytest.raises(CheckpointError, match="half of a two-file checkpoint; give the folder"):
        open_checkpoint(shutil.copy(nvfp4 / "unquantized_layers.safetensors", tmp_path))


def test_what_a_checkpoint_tells_comfyui_stays_word_for_word(tmp_path: Path):
    convert(FLUX, tmp_path / "two", "nunchaku")
    text = '{"model_class": "Flux",  "own": 1}'
    (tmp_path / "two" / "comfy_config.json").write_text(text + "\n")
    convert(tmp_path / "two", tmp_path / "canonical.safetensors", "canonical")
    convert(tmp_path / "canonical.safetensors", tmp_path / "one.safetensors", "nunchaku")
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata()["comfy_config"] == text
