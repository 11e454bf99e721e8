"""The example that trains a LoRA: it learns, and what it writes opens in diffusers and in the quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from safetensors.torch import load_file

from engine.quantize import quantize_model
from examples import train_lora
from tests.quantize.conftest import QUICK


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (80, 64), color).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {color} cube")
    return folder


def test_it_learns_and_the_merged_model_can_be_quantized(model: Path, pictures: Path, tmp_path: Path):
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    losses = train_lora.main([str(model), str(pictures), "--out", str(lora), "--merged", str(merged), "--size", "64",
                              "--length", "16", "--steps", "30", "--rank", "4", "--rate", "1e-2"])  # fmt: skip
    assert sum(losses[-8:]) < sum(losses[:8])
    before = load_file(next((model / "transformer").glob("*.safetensors")))
    after = FluxPipeline.from_pretrained(merged, dtype=torch.bfloat16).transformer.state_dict()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert set(after) == set(before)
    assert not torch.equal(after[name], before[name].bfloat16())
    file = load_file(lora / "pytorch_lora_weights.safetensors")
    delta = file["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"].float() @ \
        file["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"].float()  # fmt: skip
    assert torch.allclose(after[name].float(), before[name].float() + delta, atol=0.02, rtol=0.02)
    assert quantize_model(str(merged), tmp_path / "merged-int4", recipe=QUICK, device="cpu")


def test_a_picture_without_caption_is_named(model: Path, pictures: Path, tmp_path: Path):
    (pictures / "1.txt").unlink()
    with pytest.raises(SystemExit, match=r"^pictures: expected .* got none for 1\.png$"):
        train_lora.main([str(model), str(pictures), "--out", str(tmp_path / "lora")])


def test_noise_levels_are_shifted_as_the_pipeline_shifts_its_steps():
    """And as many as asked for are of the first steps."""
    config = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config
    shift = train_lora.time_shift(config, 1024)
    assert shift == pytest.approx(calculate_shift(1024, 256, 4096, 0.5, 1.15))
    usual = train_lora.levels(20_000, shift, 0.0, torch.Generator().manual_seed(0))
    assert float(usual.median()) == pytest.approx(float(torch.sigmoid(torch.tensor(shift))), abs=0.01)
    early = train_lora.levels(20_000, shift, 1.0, torch.Generator().manual_seed(0))
    assert 0.8 <= float(early.min()) < float(early.max()) <= 1
    half = train_lora.levels(20_000, shift, 0.5, torch.Generator().manual_seed(0))
    assert float((half > 0.8).float().mean()) == pytest.approx((1 + float((usual > 0.8).float().mean())) / 2, abs=0.02)
