"""Transformers of diffusers that have no family here: quantized, opened and run by their structure alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from engine import Engine, Request
from engine.errors import ModelError
from engine.linear import SVDQuantLinear
from engine.models import loading
from engine.models.catalogue import ModelSpec, zoo_folder
from engine.models.families import family
from engine.quantize import Recipe, quantize_model
from engine.quantize.__main__ import main as quantize

QUICK = Recipe(rank=16, rounds=2, alphas=(0.5,))
MODELS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 1, "cross_attention_dim": 128,
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_channels": 32,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64,
        "joint_attention_dim": 64, "caption_projection_dim": 128, "pooled_projection_dim": 64,
        "pos_embed_max_size": 16, "in_channels": 4, "out_channels": 4,
    },
    "QwenImageTransformer2DModel": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 64,
        "in_channels": 16, "out_channels": 4, "axes_dims_rope": (16, 24, 24),
    },
}  # fmt: skip


def inputs(name: str) -> dict[str, Any]:
    """Arguments of one call."""
    draw = torch.Generator().manual_seed(0)

    found: dict[str, Any]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).bfloat16()

    if name == "QwenImageTransformer2DModel":
        found = {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, 8, 64), "img_shapes": [(1, 4, 4)]}
        mask = torch.ones(1, 8, dtype=torch.int64)
        return found | {"encoder_hidden_states_mask": mask, "timestep": torch.tensor([0.5])}
    words = 32 if name == "PixArtTransformer2DModel" else 64
    found = {"hidden_states": noise(1, 4, 8, 8), "timestep": torch.tensor([500])}
    found["encoder_hidden_states"] = noise(1, 8, words)
    if words == 32:
        return found | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return found | {"pooled_projections": noise(1, 64)}


@pytest.fixture(params=MODELS)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSpec:
    """A row for a random model of the class."""
    torch.manual_seed(0)
    model = getattr(diffusers, request.param)(**MODELS[request.param]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model" / "transformer")
    return ModelSpec("mine", "Mine", request.param, "DiffusionPipeline", str(tmp_path / "model"))


def test_a_row_is_enough(spec: ModelSpec, tmp_path: Path):
    cpu = torch.device("cpu")
    figures = quantize_model(spec, tmp_path / "int4", recipe=QUICK, device="cpu")
    assert len(figures) > 5
    ready = replace(spec, checkpoints={"int4": str(tmp_path / "int4")})
    close = loading.quantized_transformer(ready, "int4", "reference", "w4a8", cpu)
    exact = loading.bf16_transformer(spec, cpu)
    with torch.inference_mode():
        wanted, found = (model(**inputs(spec.family), return_dict=False)[0].float() for model in (exact, close))
    assert float((found - wanted).norm() / wanted.norm()) < 0.2
    assert not torch.equal(found, wanted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole PixArt pipeline of random weights, but for the text encoder."""
    tiny = zoo_folder() / "flux-tiny"
    torch.manual_seed(0)
    narrow = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=AutoTokenizer.from_pretrained(tiny / "tokenizer_2"),
        text_encoder=T5EncoderModel.from_pretrained(tiny / "text_encoder_2", dtype=torch.bfloat16),
        vae=diffusers.AutoencoderKL(
            **narrow, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
        ),  # pyright: ignore
        transformer=diffusers.PixArtTransformer2DModel(
            **MODELS["PixArtTransformer2DModel"] | {"caption_channels": 256}
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipe.save_pretrained(tmp_path / "pixart")
    return tmp_path / "pixart"


def test_a_folder_is_calibrated_and_paints(folder: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\na blue cone\n")
    quick = ["--rank", "16", "--rounds", "1", "--size", "256", "--steps", "2", "--no-report", "--device", "cpu"]
    assert quantize([str(folder), "--out", f"{folder}-int4", "--calib", str(prompts), *quick]) == 0
    engine = Engine.load(str(folder), "int4", device="cpu")
    picture = engine.run(Request("a red cube", seed=1, steps=2, width=256, height=256)).image
    assert picture.size == (256, 256)
    assert any(isinstance(part, SVDQuantLinear) for part in engine.pipe.transformer.modules())


def test_what_is_no_transformer_is_named():
    with pytest.raises(
        ModelError, match="expected flux, sana or a transformer class of diffusers, got 'AutoencoderKL'"
    ):
        family("AutoencoderKL")
