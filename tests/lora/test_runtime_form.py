"""nunchaku's runtime form of LoRAs, and their composition, against published data."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import packing
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.pieces import same_bits
from engine.commands.convert_lora import main
from engine.errors import CheckpointError
from engine.lora import compose, read_lora
from engine.lora.convert import convert_lora
from engine.lora.published import from_runtime
from engine.lora.weights import LoraWeights
from tests.lora.conftest import FLUX, LORA


def product(tensors: dict[str, Tensor], prefix: str) -> Tensor:
    """up @ down of a layer in runtime form, in float64."""
    down, up = tensors[f"{prefix}.lora_down"], tensors[f"{prefix}.lora_up"]
    if ".norm" in prefix:
        return up.double() @ down.double()
    return packing.unpack_lora_up(up).double() @ packing.unpack_lora_down(down).double()


@pytest.mark.parametrize(
    ("lora", "wanted"),
    [
        ("diffusers", "diffusers.converted"),
        ("kohya_bfl", "kohya_bfl.converted"),
        ("xlabs", "xlabs_double_only.converted"),
    ],
)
def test_converted_layers_mean_the_same(lora: str, wanted: str, tmp_path: Path):
    assert convert_lora(FLUX, LORA / f"{lora}.safetensors", tmp_path / "out.safetensors") == []
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(LORA / f"{wanted}.safetensors")
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        prefix, _, part = name.rpartition(".")
        if part == "lora_up":
            assert torch.equal(product(found, prefix), product(expected, prefix)), name
        elif part != "lora_down":
            assert same_bits(found[name], value), name
    same = [name for name, value in expected.items() if same_bits(found[name], value)]
    assert len(same) >= len(expected) - 2, sorted(set(expected) - set(same))


def test_mlp_pairs_have_equal_ranks_and_partners(tmp_path: Path):
    lora = read_lora(LORA / "xlabs.safetensors")
    lora.factors |= {
        name: value
        for name, value in read_lora(LORA / "diffusers.safetensors").factors.items()
        if name.endswith("ff.net.0.proj")
    }
    convert_lora(FLUX, lora, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for block, first, second in (
        ("transformer_blocks.0", "mlp_fc1", "mlp_fc2"),
        ("single_transformer_blocks.0", "mlp_fc1", "mlp_fc2"),
    ):
        ranks = {found[f"{block}.{leaf}.lora_down"].shape[1] for leaf in (first, second)}
        assert ranks == {32}


def test_bias_deltas_are_added_to_the_stored_bias(tmp_path: Path):
    base = load_file(FLUX)
    lora = read_lora(LORA / "diffusers.safetensors")
    delta = torch.arange(128.0) / 8
    lora.biases = {"transformer_blocks.0.attn.to_k": delta, "single_transformer_blocks.0.proj_out": delta}
    convert_lora(FLUX, lora, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    name = "transformer_blocks.0.qkv_proj.bias"
    added = packing.unpack_vector(found[name]).float() - packing.unpack_vector(base[name]).float()
    assert torch.equal(added[:128], torch.zeros(128))
    assert torch.allclose(added[128:256], delta, atol=0.05)
    name = "single_transformer_blocks.0.out_proj.bias"
    assert torch.equal(packing.unpack_vector(found[name]).float(), delta)


def test_the_lora_is_found_again_inside_the_runtime_form(tmp_path: Path):
    lora = read_lora(LORA / "diffusers.safetensors")
    convert_lora(FLUX, lora, tmp_path / "out.safetensors")
    with closing(open_checkpoint(FLUX)) as source:
        back = from_runtime(load_file(tmp_path / "out.safetensors"), source)
    for name, (down, up) in lora.factors.items():
        if name.startswith("single") and name.endswith(".proj_out"):
            halves = [back.factors[f"{name}.{half}"] for half in ("attn", "mlp")]
            found = torch.cat([half.up.float() @ half.down.float() for half in halves], 1)
        else:
            found = back.factors[name].up.float() @ back.factors[name].down.float()
        assert torch.allclose(found, up.float() @ down.float(), atol=1e-5), name


def test_composition_of_the_vectors():
    first = read_lora(LORA / "diffusers.safetensors")
    used = {n: f for n, f in first.factors.items() if n.startswith("single") and (".attn." in n or "proj_mlp" in n)}
    whole = compose([(LoraWeights(used), 0.75), (read_lora(LORA / "compose.second.safetensors"), -0.5)])
    found, wanted = whole.tensors(), load_file(LORA / "compose.result.safetensors")
    assert found.keys() == wanted.keys()
    for name in {key.rpartition(".lora_")[0] for key in wanted}:
        deltas = [t[f"{name}.lora_B.weight"].double() @ t[f"{name}.lora_A.weight"].double() for t in (found, wanted)]
        assert torch.allclose(*deltas, atol=1e-6), name
        assert found[f"{name}.lora_A.weight"].shape == wanted[f"{name}.lora_A.weight"].shape


def test_modules_that_match_nothing_are_named(tmp_path: Path):
    lora = read_lora(LORA / "diffusers.safetensors")
    lora.factors["transformer_blocks.7.attn.to_q"] = lora.factors["transformer_blocks.0.attn.to_q"]
    with pytest.raises(CheckpointError, match=r"1 of its modules match nothing.*transformer_blocks\.7\.attn\.to_q"):
        convert_lora(FLUX, lora, tmp_path / "out.safetensors")
    assert convert_lora(FLUX, lora, tmp_path / "out.safetensors", strict=False) == ["transformer_blocks.7.attn.to_q"]


def test_a_lora_of_another_width_is_refused(tmp_path: Path):
    lora = read_lora(LORA / "diffusers.safetensors")
    name = "transformer_blocks.0.attn.to_out.0"
    lora.factors[name] = lora.factors[name]._replace(down=torch.ones(2, 256))
    with pytest.raises(CheckpointError, match="takes 128 inputs to 128 outputs, but its LoRA 256 to 128"):
        convert_lora(FLUX, lora, tmp_path / "out.safetensors")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["--quant-path", str(FLUX), "--lora-path", str(LORA / "xlabs.safetensors")]
    command += ["--output-root", str(tmp_path), "--lora-name", "style"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "style.safetensors")
    assert main([*command, "--lora-format", "comfyui"]) == 1
    assert "its keys are those of xlabs, not of comfyui" in capsys.readouterr().err
