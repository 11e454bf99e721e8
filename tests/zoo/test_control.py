"""Control LoRAs: training moves them, diffusers loads them unmodified and computes what training computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxControlPipeline

from zoo import scenes
from zoo.train import adapt, control, dist, lora, models
from zoo.train.edges import edge_f1
from zoo.train.log import read
from zoo.train.maps import depth_maps, inverse_depth
from zoo.train.optim import FlatModel

CONFIG = json.loads(Path(control.CONFIG).with_name("control_smoke.json").read_text())
WORLD = dist.World(0, 1, torch.device("cpu"))


def tuned(flux_base: Path, in_channels: int = 128) -> adapt.Tuned:
    """A model with LoRA that already does something."""
    torch.manual_seed(1)
    made = adapt.Tuned(flux_base, CONFIG, in_channels, adapt.read_start(in_channels), WORLD)
    with torch.no_grad():
        for layer in lora.layers(made.parts.transformer).values():
            layer.lora_B.normal_(std=0.05)
            for part in (layer.lora_A, layer.lora_B):
                part.copy_(part.bfloat16())  # as the file will hold it
    return made


def fake_batch(n: int, in_channels: int = 128) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    ids = lambda length: torch.randint(3, 20, (n, length), generator=g)  # noqa: E731
    return {
        "x0": torch.randn(n, 16, 64, generator=g), "condition": torch.randn(n, 16, in_channels - 64, generator=g),
        "clip": ids(77), "t5": ids(64),
    }  # fmt: skip


def velocity(model: adapt.Tuned, b: dict, guidance: float = 3.0) -> torch.Tensor:
    with torch.no_grad():
        texts = model.joint.text(b["clip"], b["t5"])
        n = len(b["x0"])
        return model.velocity(b["x0"], b["condition"], torch.full((n,), 0.5), *texts, torch.full((n,), guidance))


def test_a_new_lora_changes_nothing_and_ignores_the_condition(flux_base):
    made = adapt.Tuned(flux_base, CONFIG, 128, adapt.read_start(128), WORLD)
    b = fake_batch(2)
    other = {**b, "condition": b["condition"] + 1}
    assert torch.equal(velocity(made, b), velocity(made, other))
    plain = models.load(flux_base).transformer
    texts = made.joint.text(b["clip"], b["t5"])
    ids = torch.zeros(64, 3), made.joint.image_ids
    with torch.no_grad():
        want = plain(b["x0"], texts[0], texts[1], torch.full((2,), 0.5), ids[1], ids[0], torch.full((2,), 3.0))[0]
    torch.testing.assert_close(velocity(made, b), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("without_metadata", [False, True])
def test_diffusers_loads_the_file_and_computes_the_same(flux_base, tmp_path, without_metadata):
    made = tuned(flux_base)
    size = lora.save(made.parts.transformer, tmp_path, {"kind": "canny"})
    assert size == (tmp_path / lora.WEIGHTS).stat().st_size
    pipe = FluxControlPipeline.from_pretrained(flux_base)
    if without_metadata:  # ranks that differ must also be understood from the tensors alone
        tensors, _ = lora.read_file(tmp_path)
        pipe.load_lora_weights({f"transformer.{key}": value for key, value in tensors.items()})
    else:
        pipe.load_lora_weights(tmp_path)
    assert pipe.transformer.config.in_channels == 128
    b = fake_batch(2)
    texts = made.joint.text(b["clip"], b["t5"])
    x = torch.cat([b["x0"], b["condition"]], -1)
    with torch.no_grad():
        pipe.transformer.float()
        got = pipe.transformer(x, texts[0], texts[1], torch.full((2,), 0.5), made.joint.image_ids, torch.zeros(64, 3),
                               torch.full((2,), 3.0))[0]  # fmt: skip
    torch.testing.assert_close(got, velocity(made, b), rtol=1e-4, atol=1e-4)


def test_the_pipeline_paints_and_the_control_map_matters(flux_base, tmp_path):
    lora.save(tuned(flux_base).parts.transformer, tmp_path)
    pipe = FluxControlPipeline.from_pretrained(flux_base, dtype=torch.bfloat16)
    pipe.load_lora_weights(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    paint = lambda level: pipe(  # noqa: E731
        prompt="a red cube", control_image=torch.full((1, 3, 64, 64), level), height=64, width=64,
        num_inference_steps=2, guidance_scale=3.0, max_sequence_length=64,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    assert paint(0.0).shape == (1, 3, 64, 64)
    assert not torch.equal(paint(0.0), paint(1.0))


def test_a_merged_folder_paints_as_training_did(flux_base, tmp_path):
    made = tuned(flux_base)
    lora.save(made.parts.transformer, tmp_path / "lora")
    lora.main(["--base", str(flux_base), "--lora", str(tmp_path / "lora"), "--pipeline", "FluxControlPipeline", "--out",
               str(tmp_path / "whole")])  # fmt: skip
    pipe = FluxControlPipeline.from_pretrained(tmp_path / "whole")
    assert type(pipe) is FluxControlPipeline
    assert pipe.transformer.config.in_channels == 128
    assert pipe.transformer.config.out_channels == 64
    merged = lora.merge(flux_base, tmp_path / "lora")
    b = fake_batch(1)
    texts = made.joint.text(b["clip"], b["t5"])
    with torch.no_grad():
        got = merged(torch.cat([b["x0"], b["condition"]], -1), texts[0], texts[1], torch.full((1,), 0.5),
                     made.joint.image_ids, torch.zeros(64, 3), torch.full((1,), 3.0))[0]  # fmt: skip
    torch.testing.assert_close(got, velocity(made, b), rtol=1e-4, atol=1e-4)


def stepper(made, draw, config, seed=0):
    """A training step whose teacher is the model as it is, so that half of each batch is guided."""
    model = FlatModel(made, WORLD, lr=1e-3)
    step = adapt.Step(made, model, draw, config, WORLD, torch.Generator().manual_seed(seed))
    step.teacher = model.flat.clone()
    return step


def test_every_layer_learns_under_autocast(flux_base, monkeypatch):
    """A pass without gradients comes first in each step; its 16-bit weights must not serve the second."""
    monkeypatch.setattr(adapt, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    made = tuned(flux_base)
    loss = stepper(made, lambda n, g: fake_batch(n), CONFIG["train"])()
    assert torch.isfinite(loss)
    for name, layer in lora.layers(made.parts.transformer).items():
        for part in (layer.lora_A, layer.lora_B):
            assert part.grad is not None, name
            assert part.grad.any(), name
    frozen = [n for n, p in made.named_parameters() if p.grad is not None and not n.endswith(("lora_A", "lora_B"))]
    assert not frozen


def test_the_guided_half_aims_further_along_the_prompt(flux_base):
    made = tuned(flux_base)
    b, count = fake_batch(4), 2
    with torch.no_grad():
        said = made.joint.text(b["clip"], b["t5"])
    step = stepper(made, lambda n, g: b, CONFIG["train"])
    before = step.model.flat.clone()
    with torch.no_grad():
        step.model.flat.add_(0.01)  # what the model has become since does not count
    direction = step._direction(b["x0"], b, torch.full((4,), 0.5), said, count)
    step.model.flat.copy_(before)
    empty = {**b, "clip": made.empty[0].expand(4, -1), "t5": made.empty[1].expand(4, -1)}
    want = (velocity(made, b, 1.0) - velocity(made, empty, 1.0))[:count]
    torch.testing.assert_close(direction, want, rtol=1e-4, atol=1e-5)


def test_one_case_can_be_learnt(flux_base):
    """The loss of a single repeated case falls well below that of the base: the condition path really trains."""
    torch.manual_seed(2)
    made = adapt.Tuned(flux_base, {**CONFIG, "lora": {"rank": 16}}, 128, adapt.read_start(128), WORLD)
    b = fake_batch(4)
    config = {**CONFIG["train"], "lr": 1e-2, "guidance": [1.0, 1.0]}
    step = stepper(made, lambda n, g: {k: v[:n].clone() for k, v in b.items()}, config)
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=config["lr"])
    losses = []
    for _ in range(24):
        optimizer.zero_grad(set_to_none=False)
        losses.append(float(step()))
        optimizer.step()
    assert sum(losses[-6:]) < 0.85 * sum(losses[:6])


@pytest.mark.slow
def test_the_driver_runs_from_start_to_sheet(flux_base, tmp_path):
    config = Path(control.CONFIG).with_name("control_smoke.json")
    control.main(["--kind", "canny", "depth", "--base", str(flux_base), "--out", str(tmp_path), "--minutes", "5",
                  "--device", "cpu", "--config", str(config), "--max-steps", "2"])  # fmt: skip
    for kind in ("canny", "depth"):
        assert (tmp_path / kind / lora.WEIGHTS).is_file()
        assert (tmp_path / "samples" / f"{kind}.jpg").is_file()
    rows = read(tmp_path / "logs" / "log.jsonl")
    assert rows[-1]["stage"] == "done"
    assert any("edge_f1" in row for row in rows)
    assert (tmp_path / "logs" / "curves.png").is_file()
    earlier = {path: path.read_bytes() for path in tmp_path.glob(f"*/{lora.WEIGHTS}")}
    argv = ["--kind", "canny", "--base", str(flux_base), "--out", str(tmp_path / "on"), "--resume", str(tmp_path)]
    control.main([*argv, "--minutes", "5", "--device", "cpu", "--config", str(config), "--max-steps", "1"])
    assert (tmp_path / "on" / "canny" / lora.WEIGHTS).is_file()
    assert earlier == {path: path.read_bytes() for path in earlier}, "going on must not write over where it started"


def test_depth_maps_are_near_bright_and_whole():
    drawn = scenes.render(scenes.sample(2, seed=8), size=64, oversample=1)
    maps = depth_maps(drawn, torch.Generator().manual_seed(0))
    assert maps.shape == (2, 2, 64, 64)
    assert maps.dtype == torch.uint8
    for picture in maps[:, 0]:
        assert picture.min() == 0
        assert picture.max() == 255
    nearest = drawn.depth.flatten(1).argmin(1)
    assert (maps[:, 0].flatten(1).gather(1, nearest[:, None]) == 255).all()
    exact = inverse_depth(drawn.depth)
    for one, other in zip(exact, maps[:, 1], strict=True):  # the bent version keeps the order of depths, nearly
        both = torch.stack([one.flatten(), other.flatten().float()])
        assert torch.corrcoef(both.argsort(1).argsort(1).float())[0, 1] > 0.9


def test_edge_f1_forgives_two_pixels_and_no_more():
    line = torch.zeros(1, 32, 32, dtype=torch.bool)
    line[:, :, 10] = True
    shifted = lambda by: torch.roll(line, by, 2)  # noqa: E731
    assert float(edge_f1(line, line)) == 1
    assert float(edge_f1(shifted(2), line)) == 1
    assert float(edge_f1(shifted(3), line)) == 0
    assert float(edge_f1(torch.zeros_like(line), line)) == 0
    assert float(edge_f1(torch.zeros_like(line), torch.zeros_like(line))) == 1
