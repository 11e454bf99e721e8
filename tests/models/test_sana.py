"""SANA with replaced leaves, and the stages that make a picture with it, on a whole random pipeline folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import (
    PAGCFGSanaLinearAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
)

from engine import Cancelled, Engine, Request, RequestError
from engine.checkpoint.files import TensorFiles
from engine.linear import SVDQuantLinear
from engine.models import sana
from engine.models.catalogue import resolve
from engine.models.install import load_quantized
from engine.quantize import Recipe, quantize_model

# D = 64 and a feed-forward of 160: no multiple of 64, as SANA-1.6B's 5600 is none.
CONFIG = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 64,
    "sample_size": 16,
}
CPU = torch.device("cpu")
PROMPT = "a red cube"


def small_sana(seed: int = 0) -> SanaTransformer2DModel:
    """Random weights of a size that training would give."""
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(**CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval().requires_grad_(False)


def inputs(batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(batch, 12)
    mask[0, 5:] = 0
    return {
        "hidden_states": torch.randn(batch, 32, 4, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 12, 64, generator=generator).to(dtype),
        "encoder_attention_mask": mask,
        "timestep": torch.full((batch,), 500.0),
    }


def run(model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16, batch: int = 2) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs(batch, dtype), return_dict=False)[0].float()


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole SANA pipeline with random weights, and its INT4 checkpoint beside it."""
    from zoo.train import sana_models, sana_text

    root = tmp_path_factory.mktemp("sana")
    sana_text.build_tokenizer(["a", "red", "cube", "blue", "ball"], root / "tokenizer", limit=400)
    blocks, layers = [8, 8, 16, 16, 32, 32], [0, 1, 1, 1, 1, 1]
    config = {
        "transformer": CONFIG,
        "gemma": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        },
        "vae": {
            "latent_channels": 32,
            "encoder_block_out_channels": blocks,
            "decoder_block_out_channels": blocks,
            "encoder_layers_per_block": layers,
            "decoder_layers_per_block": layers,
            "encoder_qkv_multiscales": [[]] * 6,
            "decoder_qkv_multiscales": [[]] * 6,
            "upsample_block_type": "interpolate",
        },
    }
    torch.manual_seed(0)
    parts = sana_models.build(config, sana_text.Encoder(root / "tokenizer", 16).vocab_size)
    parts.transformer = small_sana()
    sana_models.export(parts, 2.0, root / "tokenizer", root / "model")
    recipe = Recipe(rank=16, rounds=2, alphas=(0.5,))
    quantize_model(str(root / "model"), root / "model-int4", prompts=[PROMPT], recipe=recipe, device="cpu")
    return root / "model"


def quantized(folder: Path, activation: str = "w4a8") -> torch.nn.Module:
    return load_quantized(
        folder.with_name("model-int4"),
        SanaTransformer2DModel,
        sana,
        backend="reference",
        activation=activation,  # pyright: ignore[reportArgumentType]
        device=CPU,
    )


def test_linears_in_place_of_convolutions_keep_the_function():
    assert relative(run(sana.prepare(small_sana()), torch.float32), run(small_sana(), torch.float32)) < 1e-5


def test_every_linear_of_a_block_but_keys_and_values_of_the_text_is_planned_once():
    model = sana.prepare(small_sana())
    planned = [name for group in sana.plan(model) for name in group.names]
    in_blocks = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("transformer_blocks")
    }
    assert len(planned) == len(set(planned))
    assert in_blocks - set(planned) == {f"transformer_blocks.{i}.attn2.to_{part}" for i in range(2) for part in "kv"}
    assert set(planned) <= in_blocks


@pytest.mark.parametrize(("activation", "limit"), [("w4a8", 0.2), ("w4a4", 0.3)])
def test_int4_stays_near_bf16(folder: Path, activation: str, limit: float):
    exact = run(small_sana().bfloat16())
    assert 0 < relative(run(quantized(folder, activation)), exact) < limit


def test_leaves_are_replaced_and_qkv_is_one_layer(folder: Path):
    model = quantized(folder)
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name in ("attn1.to_qkv", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ff.conv_inverted", "ff.conv_point"):
        assert kinds[f"transformer_blocks.1.{name}"] is SVDQuantLinear, name
    assert kinds["transformer_blocks.1.attn2.to_k"] is torch.nn.Linear
    assert kinds["transformer_blocks.1.ff.conv_depth"] is torch.nn.Conv2d
    assert "transformer_blocks.1.attn1.to_q" not in kinds


def test_the_file_holds_the_inputs_that_exist_and_the_layer_whole_groups(folder: Path):
    files = TensorFiles(folder.with_name("model-int4"))
    name = "transformer_blocks.0.ff.conv_point"
    assert files.shape(f"{name}.codes") == (64, 80)
    assert files.shape(f"{name}.wscales") == (64, 3)
    assert files.shape(f"{name}.smooth") == (160,)
    assert quantized(folder).get_submodule(name).in_features == 192
    unprepared = set(small_sana().state_dict())
    assert {key for key in files if key.endswith((".weight", ".bias"))} <= unprepared


def test_nvfp4_takes_a_width_that_is_no_multiple_of_64(folder: Path, tmp_path: Path):
    recipe = Recipe(precision="nvfp4", rank=16, rounds=1, alphas=())
    quantize_model(str(folder), tmp_path / "nvfp4", recipe=recipe, device="cpu")
    model = load_quantized(
        tmp_path / "nvfp4", SanaTransformer2DModel, sana, backend="reference", activation="w4a8", device=CPU
    )
    assert relative(run(model), run(small_sana().bfloat16())) < 0.2


def test_fused_attention_is_diffusers_attention():
    plain, fused = small_sana(), small_sana()
    for block in fused.transformer_blocks:
        block.attn1.set_processor(sana.LinearAttention())
    assert relative(run(fused, torch.float32), run(plain, torch.float32)) < 1e-5


@pytest.mark.parametrize(
    ("parts", "theirs"), [(3, PAGCFGSanaLinearAttnProcessor2_0), (2, PAGIdentitySanaLinearAttnProcessor2_0)]
)
def test_perturbed_attention_is_diffusers_perturbed_attention(parts: int, theirs: Callable[[], object]):
    plain, own, untouched = small_sana(), small_sana(), small_sana()
    plain.transformer_blocks[1].attn1.set_processor(theirs())
    own.transformer_blocks[1].attn1.set_processor(sana.PerturbedAttention(parts))
    exact = run(plain, torch.float32, batch=6)
    assert relative(run(own, torch.float32, batch=6), exact) < 1e-5
    assert relative(run(untouched, torch.float32, batch=6), exact) > 1e-3


@pytest.fixture(scope="module")
def engines(folder: Path) -> tuple[Engine, Engine]:
    dense = Engine.load(str(folder), "bf16", device="cpu")
    return dense, Engine.load(str(folder), "int4", device="cpu", share=dense)


def test_an_engine_makes_true_sizes_and_the_same_picture_again(engines: tuple[Engine, Engine]):
    request = Request(PROMPT, seed=3, steps=2, width=288, height=256)
    for engine in engines:
        steps = []
        first, second = engine.run(request, on_step=steps.append), engine.run(request)
        assert first.image.size == (288, 256)
        assert [step.index for step in steps] == [1, 2]
        assert first.image.tobytes() == second.image.tobytes()
        assert set(first.stages) == {"encode", "denoise", "decode"}
    assert engines[1].weight_bytes < engines[0].weight_bytes
    assert engines[1].pipe.text_encoder is engines[0].pipe.text_encoder


def test_a_run_is_what_the_unmodified_pipeline_makes(folder: Path, engines: tuple[Engine, Engine]):
    from diffusers import SanaPipeline

    from engine.models.loading import settle_vae_on_cpu

    ours = engines[0].run(Request(PROMPT, seed=3, steps=2, guidance=4.5, width=256, height=256))
    pipe = SanaPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    settle_vae_on_cpu(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(PROMPT, num_inference_steps=2, guidance_scale=4.5, width=256, height=256,
                  generator=torch.Generator().manual_seed(3), use_resolution_binning=False).images[0]  # fmt: skip
    # Where the VAE runs in BF16 the pipeline scales latents and pixels in BF16 as well; the engine does so in float32.
    apart = torch.tensor(list(ours.image.tobytes()), dtype=torch.int16) - torch.tensor(list(theirs.tobytes()))
    assert apart.abs().max() <= (0 if pipe.vae.dtype == torch.float32 else 6)
    assert apart.abs().float().mean() < 1


def test_perturbed_attention_guidance_in_both_precisions(folder: Path):
    from dataclasses import replace

    spec = replace(resolve(str(folder)), pipeline="SanaPAGPipeline")
    for precision in spec.precisions:
        engine = Engine.load(spec, precision, device="cpu")
        request = Request(PROMPT, seed=3, steps=2, width=256, height=256)
        plain, guided = engine.run(request), engine.run(replace(request, inputs={"pag_scale": 3.0}))
        assert plain.image.tobytes() != guided.image.tobytes()
        assert engine.run(request).image.tobytes() == plain.image.tobytes()


def test_stop_ends_a_run(engines: tuple[Engine, Engine]):
    steps = []
    with pytest.raises(Cancelled):
        engines[0].run(Request(PROMPT, steps=9, width=256, height=256), steps.append, lambda: len(steps) == 2)
    assert len(steps) == 2


def test_a_size_that_is_no_multiple_of_32_is_refused(engines: tuple[Engine, Engine]):
    with pytest.raises(RequestError, match="multiple of 32"):
        engines[0].run(Request(PROMPT, width=272))


def test_the_table_knows_sana():
    assert resolve("sana").name == "sana-1.6b"
    assert resolve("tiny-sana").pipeline == "SanaPAGPipeline"
    assert resolve("Efficient-Large-Model/Sana_600M_512px_diffusers").family == "sana"
    assert resolve("black-forest-labs/FLUX.1-dev").family == "flux"


def test_a_batch_for_the_evaluation_is_single_runs(engines: tuple[Engine, Engine]):
    from zoo.evaluate import batched
    from zoo.probe.judge import stack

    requests = [
        Request(text, seed=seed, steps=2, width=256, height=256) for seed, text in enumerate(("a cube", PROMPT))
    ]
    together = batched(engines[0], requests).int()
    apart = stack([engines[0].run(request).image for request in requests]).int()
    assert float((together - apart).abs().float().mean()) < 1.0
    assert float((together[0] - together[1]).abs().float().mean()) > 3.0
