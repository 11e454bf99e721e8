"""Evaluation of picture models: the measures on known pictures, and a whole run at its smallest."""

from __future__ import annotations

import json

import pytest
import torch

from engine.lora import list_loras
from zoo import evaluate_image, scenes
from zoo.probe import Detection, Probe
from zoo.probe.model import Network
from zoo.train import lora, models, outliner, redux, redux_model, side, sketch, strokes
from zoo.train.adapt import Tuned
from zoo.train.dist import World


def seen(shape: str, color: str) -> Detection:
    return Detection(shape, color, "small", "matte", 0.5, 0.5, 7.0, 1.0)


def test_captions_name_every_object():
    batch = scenes.sample(8, 1, "test")
    for i, caption in enumerate(evaluate_image.captions_of(batch)):
        assert len(caption.objects) == batch.count[i]
        assert caption.objects[0].shape == scenes.SHAPES[batch.shape[i, 0]]
        assert caption.objects[0].material == scenes.MATERIALS[batch.material[i, 0]]


def test_colors_count_as_often_as_they_are_named():
    named = [scenes.Named(0, "cube", "red"), scenes.Named(1, "cone", "red")]
    caption = scenes.Caption("", tuple(named))
    assert evaluate_image.all_colors(caption, [seen("sphere", "red"), seen("cube", "red"), seen("cube", "blue")])
    assert not evaluate_image.all_colors(caption, [seen("cube", "red"), seen("cone", "blue")])


def test_a_mix_must_hold_something_of_each():
    a, b = (scenes.Caption("", (scenes.Named(0, "cube", c),)) for c in ("red", "blue"))
    both = evaluate_image.both_shown(a, b, [seen("cube", "red"), seen("sphere", "blue")])
    assert both == {"colors_both": True, "objects_both": False, "all": False}
    assert not any(evaluate_image.both_shown(a, b, [seen("cube", "red"), seen("cube", "red")]).values())
    assert all(evaluate_image.both_shown(a, b, [seen("cube", "red"), seen("cube", "blue")]).values())


def test_pairs_share_no_color_and_no_scene():
    batch = scenes.sample(64, 2, "test")
    captions = evaluate_image.captions_of(batch)
    pairs = evaluate_image.choose_pairs(batch, captions)
    assert len(pairs) >= 10
    assert len({i for pair in pairs for i in pair}) == 2 * len(pairs)
    for a, b in pairs:
        assert len(captions[a].objects) + len(captions[b].objects) <= 3
        assert not {n.color for n in captions[a].objects} & {n.color for n in captions[b].objects}


def test_canny_finds_the_lines_of_renders():
    batch = scenes.sample(2, 4)
    thin = strokes.find(batch, 128, "cpu").thin()
    image = scenes.render(batch, 128, oversample=1).image
    assert evaluate_image.canny_recall(image, thin) > 0.6
    assert evaluate_image.canny_recall(torch.full_like(image, 90), thin) == 0


@pytest.fixture
def probe(tmp_path):
    Probe(Network(), {}).save(tmp_path / "probe")
    return tmp_path / "probe"


def small(base, probe, folder) -> list[str]:
    where = ["--model", str(base), "--probe", str(probe), "--out", str(folder / "out"), "--device", "cpu"]
    return [*where, "--precisions", "bf16", "--count", "3", "--batch", "2", "--size", "64"]


def test_sketch_evaluation_writes_its_results(flux_base, probe, tmp_path):
    config = json.loads(sketch.CONFIG.with_name("sketch_smoke.json").read_text())
    config["lora"]["targets"] = sketch.TARGETS
    tuned = Tuned(flux_base, config, 64, torch.eye(64), World(0, 1, torch.device("cpu")))
    with torch.no_grad():
        for layer in lora.layers(tuned.parts.transformer).values():
            layer.lora_B.normal_(std=0.3)
    side.strengthen(tuned.parts.transformer, 1)
    sketch.save(tuned, tmp_path)
    outliner.Outliner().save(tmp_path / "outline", {})
    own = ["--lora", str(tmp_path / "model"), "--outline", str(tmp_path / "outline"), "--alphas", "0.3", "0.5"]
    evaluate_image.main(["sketch", *small(flux_base, probe, tmp_path), *own])
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert set(rows) == {"bf16 alpha 0.3", "bf16 alpha 0.5", "renders"}
    assert rows["renders"]["canny_recall"] > 0.3
    assert (tmp_path / "out" / "sketch-bf16.jpg").is_file()


def with_lora(base, folder) -> None:
    """A LoRA that changes much, written into the folder."""
    transformer = models.load(base).transformer
    lora.inject(transformer, 4, 64, torch.eye(64)[:4])
    with torch.no_grad():
        for layer in lora.layers(transformer).values():
            layer.lora_B.normal_(std=0.3)
    lora.save(transformer, folder)


@pytest.mark.parametrize("kind", ["redux", "sketch"])
def test_the_lora_that_is_scored_is_put_on_as_pages_do_it(kind, flux_base, probe, tmp_path):
    folder = tmp_path / "tuned"
    where = [kind, *small(flux_base, probe, tmp_path), f"--{dict(redux='redux', sketch='lora')[kind]}", str(folder)]
    options = evaluate_image._parser().parse_args([*where, *(["--outline", "x"] if kind == "sketch" else [])])
    if kind == "redux":  # that of a large model has none
        assert evaluate_image.Bench(options, "cpu", Probe.load(probe, "cpu")).spec.lora == ""
    with_lora(flux_base, folder)
    engine = evaluate_image.Bench(options, "cpu", Probe.load(probe, "cpu")).engine("bf16")
    assert [(worn.name, worn.strength) for worn in list_loras(engine)] == [(engine.spec.name, 1.0)]


def test_redux_evaluation_writes_its_results(flux_base, probe, tmp_path):
    config = json.loads(redux.CONFIG.with_name("redux_smoke.json").read_text())
    redux_model.save(redux_model.Redux(config["vision"], 32), tmp_path / "redux")
    redux_model.link(tmp_path / "redux", flux_base)
    own = ["--redux", str(tmp_path / "redux"), "--steps", "1", "--text-length", "64"]
    evaluate_image.main(["redux", *small(flux_base, probe, tmp_path), *own])
    painted = (tmp_path / "out" / "variations-bf16.jpg").read_bytes()
    with_lora(flux_base, tmp_path / "redux")  # as the folder of a small Redux has it
    evaluate_image.main(["redux", *small(flux_base, probe, tmp_path), *own])
    assert (tmp_path / "out" / "variations-bf16.jpg").read_bytes() != painted
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert set(rows) == {"bf16", "renders"}
    assert rows["bf16"]["pictures"] == 3
    assert {"mix_colors_both", "chance_colors_both", "each", "copy_psnr"} <= set(rows["bf16"])
    assert (tmp_path / "out" / "mixes-bf16.jpg").is_file()
