"""The sketch model's training at its smallest, its drawings, and what its files compute when others load them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from engine.models.sketch import sketch_to_image, to_lines
from zoo import scenes
from zoo.train import adapt, dist, lora, one_step, outliner, side, sketch, strokes
from zoo.train.log import read

SMOKE = Path(sketch.CONFIG).with_name("sketch_smoke.json")
WORLD = dist.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(flux_base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sketch")
    where = ["--base", str(flux_base), "--out", str(out), "--config", str(SMOKE)]
    sketch.main([*where, "--max-steps", "4", "--device", "cpu", "--minutes", "5"])
    return out


def test_a_run_leaves_weights_lines_sheet_and_log(run):
    rows = read(run / "logs" / "log.jsonl")
    assert {"start", "cases", "outline", "sketch", "done"} <= {row["stage"] for row in rows}
    assert any("critic" in row for row in rows)
    assert [row["alpha"] for row in rows if "alpha" in row] == list(sketch.ALPHAS)
    assert all(0 <= row["outline_iou"] <= 1 for row in rows if "outline_iou" in row)
    assert (run / "samples" / "sketch.jpg").stat().st_size > 1000
    assert (run / "logs" / "curves.png").is_file()
    assert outliner.Outliner.load(run / "outline").threshold in outliner.THRESHOLDS
    tensors, about = lora.read_file(run / "model")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert about["kind"] == "sketch"
    names = {key.rpartition(".lora_")[0] for key in tensors}
    assert {"x_embedder", "proj_out", "norm_out.linear", "transformer_blocks.0.norm1.linear"} <= names
    assert any(tensors[f"{name}.lora_B.weight"].any() for name in names)


@pytest.fixture(scope="module")
def strong(flux_base, tmp_path_factory) -> tuple[adapt.Tuned, Path]:
    """A base with a LoRA that does much, and the folder of its file."""
    config = json.loads(SMOKE.read_text())
    config["lora"]["targets"] = sketch.TARGETS
    torch.manual_seed(1)
    tuned = adapt.Tuned(flux_base, config, 64, torch.eye(64), WORLD)
    with torch.no_grad():
        for layer in lora.layers(tuned.parts.transformer).values():
            layer.lora_B.normal_(std=0.05)
            for part in (layer.lora_A, layer.lora_B):
                part.copy_(part.bfloat16())
    folder = tmp_path_factory.mktemp("lora")
    lora.save(tuned.parts.transformer, folder)
    return tuned, folder


def one_pass(transformer: torch.nn.Module, n: int = 2) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    config = transformer.config
    with torch.no_grad():
        return transformer(
            hidden_states=draw(n, 16, 64), timestep=torch.ones(n), guidance=torch.ones(n),
            pooled_projections=draw(n, config.pooled_projection_dim),
            encoder_hidden_states=draw(n, 8, config.joint_attention_dim),
            img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3), return_dict=False,
        )[0]  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.28, 1.0])
def test_peft_computes_what_training_computed(strong, flux_base, alpha):
    tuned, folder = strong
    strength = side.strengthen(tuned.parts.transformer, 1)
    strength.fill_(alpha)
    want = one_pass(tuned.parts.transformer)
    pipe = FluxPipeline.from_pretrained(flux_base, dtype=torch.float32)
    plain = one_pass(pipe.transformer)
    pipe.load_lora_weights(folder)
    pipe.transformer.float()
    pipe.set_adapters(pipe.get_list_adapters()["transformer"], [alpha])
    torch.testing.assert_close(one_pass(pipe.transformer), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, want, rtol=1e-4, atol=1e-5) if alpha == 0 else None
    assert alpha == 0 or (plain - want).abs().max() > 1e-2


def test_rows_have_strengths_of_their_own(strong):
    tuned, _ = strong
    strength = side.strengthen(tuned.parts.transformer, 2)
    strength.copy_(torch.tensor([0.2, 0.9]))
    both = one_pass(tuned.parts.transformer)
    for row, alpha in enumerate((0.2, 0.9)):
        side.strengthen(tuned.parts.transformer, 1).fill_(alpha)
        torch.testing.assert_close(both[row], one_pass(tuned.parts.transformer)[row], rtol=1e-4, atol=1e-5)


def test_the_sampler_paints_with_a_peft_lora_and_repeats_itself(strong, flux_base):
    pipe = FluxPipeline.from_pretrained(flux_base, dtype=torch.float32)
    pipe.load_lora_weights(strong[1])
    lines = strokes.neat(strokes.find(scenes.sample(2, 1), 64, "cpu"))[:, None].expand(-1, 3, -1, -1).float() / 255
    paint = lambda seed: sketch_to_image(  # noqa: E731
        pipe, lines, ["a red cube", "a ball"], 0.4, torch.Generator().manual_seed(seed), height=64, width=64,
        max_sequence_length=64, output_type="pt",
    )  # fmt: skip
    assert paint(1).shape == (2, 3, 64, 64)
    assert torch.equal(paint(1), paint(1))
    assert not torch.equal(paint(1), paint(2))


def test_drawings_are_strokes_near_the_lines():
    lines = strokes.find(scenes.sample(4, 2), 128, "cpu")
    thin = lines.thin()
    neat = strokes.neat(lines)
    assert neat.shape == (4, 128, 128)
    assert neat.float().mean() > 200  # mostly paper
    assert (neat[thin] < 128).float().mean() > 0.95
    g = torch.Generator().manual_seed(0)
    drawn = strokes.draw(lines, g)
    assert not torch.equal(drawn, strokes.draw(lines, g))
    found = to_lines(drawn[:, None].float() / 255, 128, 128)[:, 0] > 0
    near = torch.nn.functional.max_pool2d(thin[:, None].float(), 9, 1, 4)[:, 0] > 0
    ground = torch.nn.functional.max_pool2d(lines.ground[:, None].float(), 2)
    near |= torch.nn.functional.max_pool2d(ground, 9, 1, 4)[:, 0] > 0
    assert (found & near).sum() >= 0.97 * found.sum()


def test_wider_strokes_hold_thinner_ones():
    ink = torch.zeros(1, 32, 32, dtype=torch.bool)
    ink[0, 16, 8:24] = True
    sizes = [strokes.widen(ink, torch.full((1, 1, 1), float(w))) for w in range(6)]
    assert torch.equal(sizes[0].bool(), ink)
    for thin, wide in itertools.pairwise(sizes):
        assert (wide >= thin).all()
        assert wide.sum() > thin.sum()


def test_outline_iou_is_one_for_equal_lines_and_tolerant():
    lines = torch.zeros(1, 32, 32, dtype=torch.bool)
    lines[0, 10, 5:25] = True
    assert outliner.outline_iou(lines, lines).item() == pytest.approx(1)
    assert outliner.outline_iou(lines.roll(2, 1), lines).item() == pytest.approx(1)
    assert outliner.outline_iou(lines.roll(6, 1), lines).item() == pytest.approx(0)


def test_strengths_cover_the_slider():
    alphas = one_step.strengths(4000, torch.Generator().manual_seed(0))
    assert alphas.min() >= 0.12
    assert alphas.max() <= 1.0
    assert ((alphas > 0.2) & (alphas < 0.55)).float().mean() > 0.7
