"""Redux at its smallest: the unmodified prior pipeline opens what training leaves, and scenes are dealt out whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from PIL import Image

from zoo import scenes
from zoo.train import models, redux, redux_cases, redux_model, redux_paint, remix
from zoo.train.captions import labels
from zoo.train.log import read

SMOKE = Path(redux.CONFIG).with_name("redux_smoke.json")
CONFIG = json.loads(SMOKE.read_text())


@pytest.fixture(scope="module")
def run(flux_base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("redux")
    where = ["--base", str(flux_base), "--out", str(out), "--config", str(SMOKE)]
    redux.main([*where, "--max-steps", "3", "--device", "cpu", "--minutes", "5"])
    return out


@pytest.fixture(scope="module")
def prior(run) -> FluxPriorReduxPipeline:
    return FluxPriorReduxPipeline.from_pretrained(run / "model", dtype=torch.float32)


def pictures(n: int, size: int = 64) -> list[Image.Image]:
    return redux_paint.pil(scenes.render(scenes.sample(n, 3), size=size, oversample=1).image)


def test_a_run_leaves_a_folder_sheets_and_a_log(run):
    rows = read(run / "logs" / "log.jsonl")
    assert {"start", "cases", "redux", "names", "flow", "samples", "done"} <= {row["stage"] for row in rows}
    assert all(row["valid"] > 0 for row in rows if "valid" in row)
    assert {p.name for p in (run / "samples").iterdir()} == {"variations.jpg", "mixes.jpg"}
    assert all((run / "model" / name).is_symlink() for name in redux_model.LINKED)


def test_the_prior_gives_the_layout_that_training_uses(run, prior, flux_base):
    picture = pictures(1)[0]
    out = prior(picture, prompt="")
    tokens = (CONFIG["vision"]["image_size"] // CONFIG["vision"]["patch_size"]) ** 2
    assert out.prompt_embeds.shape == (1, redux_model.TEXT_LENGTH + tokens, 32)
    frozen = redux.Frozen(flux_base, CONFIG, tokens, torch.device("cpu"))
    torch.testing.assert_close(out.prompt_embeds[:, :512], frozen.empty[512], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.pooled_prompt_embeds, frozen.pooled, rtol=1e-4, atol=1e-5)
    network = redux_model.Redux(CONFIG["vision"], 32).eval()
    redux_model.restore(network, run / "model")
    image = prior.feature_extractor.preprocess(picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(out.prompt_embeds[:, 512:], network(image), rtol=1e-4, atol=1e-5)


def test_pictures_are_resized_as_the_processor_does(prior):
    image = scenes.render(scenes.sample(2, 3), size=64, oversample=1).image
    want = prior.feature_extractor.preprocess(redux_paint.pil(image), return_tensors="pt").pixel_values
    got = redux_cases.to_tower(image, 32).float() / 127.5 - 1
    assert (got - want).abs().mean() < 0.01


def test_a_mix_is_the_weighted_sum_and_paints(prior, flux_base):
    one, two = pictures(2)
    states, pooled = redux_paint.embed(prior, [[one], [two], [one, two]], [[1], [1], [0.3, 0.7]])
    torch.testing.assert_close(states[2], 0.3 * states[0] + 0.7 * states[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled[2], pooled[0], rtol=1e-4, atol=1e-5)
    short, _ = redux_paint.embed(prior, [[one]], [[1]], text_length=64)
    torch.testing.assert_close(short[:, 64:], states[:1, 512:], rtol=1e-4, atol=1e-5)
    pipe = FluxPipeline.from_pretrained(flux_base, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    painted = redux_paint.paint(pipe, states, pooled, steps=2, guidance=2.5, size=64)
    assert painted.shape == (3, 3, 64, 64)
    again = redux_paint.paint(pipe, states[1:2], pooled[1:2], steps=2, guidance=2.5, size=64)
    assert again.shape == (1, 3, 64, 64)


def test_a_batch_mixes_like_the_pipeline():
    embeddings = torch.randn(4, 3, 5)
    b = redux_cases.Batch(torch.zeros(0), torch.tensor([0.4]), torch.zeros(0), torch.zeros(0), torch.zeros(0))
    mixed = b.mix(embeddings)
    assert torch.equal(mixed[:2], embeddings[:2])
    torch.testing.assert_close(mixed[2], 0.4 * embeddings[2] + 0.6 * embeddings[3])


def test_the_shipped_size_stays_below_four_megabytes():
    config = json.loads(Path(redux.CONFIG).read_text())
    network = redux_model.Redux(config["vision"], 256)
    assert 2 * (models.count(network.tower) + models.count(network.embedder)) <= 4e6


def test_the_embedder_begins_with_the_spread_of_text():
    torch.manual_seed(0)
    network = redux_model.Redux(CONFIG["vision"], 32)
    states = 0.5 + 0.3 * torch.randn(500, 32)
    sample = torch.rand(16, 3, 32, 32) * 2 - 1
    network.begin_like(states, sample)
    out = network(sample).flatten(0, 1)
    torch.testing.assert_close(out.mean(0), states.mean(0), rtol=0.01, atol=0.01)
    assert 0.5 < out.std(0).mean() / states.std(0).mean() < 2


def test_variations_keep_objects_and_fit():
    batch, g = scenes.sample(48, 5), torch.Generator().manual_seed(0)
    new = remix.moved(batch, g)
    for name in ("shape", "color", "size", "material", "count", "floor", "sky"):
        assert torch.equal(getattr(new, name), getattr(batch, name))
    assert remix.fits(new).float().mean() >= remix.fits(batch).float().mean() - 0.03
    shift = (new.position - batch.position).abs().amax((1, 2))
    assert (shift > 0.05).float().mean() > 0.5
    assert shift.max() <= 0.35 + 1e-5
    torch.testing.assert_close(new.light.norm(dim=1), batch.light.norm(dim=1))


def test_dealt_out_objects_are_all_there():
    batch, g = scenes.sample(64, 5), torch.Generator().manual_seed(0)
    batch = batch[(batch.count >= 2).nonzero().squeeze(1)]
    one, two = remix.deal(batch, g)
    assert torch.equal(one.count + two.count, batch.count)
    assert min(one.count.min(), two.count.min()) >= 1
    assert torch.equal((labels(one) | labels(two)).bool(), labels(batch).bool())
    assert not torch.equal(two.floor_rgb, batch.floor_rgb)
    with pytest.raises(ValueError, match="one object"):
        remix.deal(scenes.sample(16, 1), g)
    scenes.render(two[:1], size=32, oversample=1)


def test_tokens_see_the_objects_that_are_there():
    batch = scenes.sample(4, 6)
    places = redux_cases.kinds(batch, scenes.render(batch, 64, oversample=1).mask, 8)
    assert places.shape == (4, 8, 8)
    for i in range(4):
        found = {k for k in places[i].flatten().tolist() if k >= 0}
        rows = zip(*(getattr(batch, n)[i].tolist() for n in ("shape", "color", "size", "material")), strict=True)
        there = [((s * 8 + c) * 2 + z) * 2 + m for s, c, z, m in rows][: batch.count[i]]
        assert found
        assert found <= set(there)
    head = redux_model.Seeing(5)
    states = torch.randn(4, 64, 5)
    assert head.loss(states, places.flatten(1).long()) > 0
    assert head.loss(states, torch.full((4, 64), -1)).isfinite()


def test_linking_again_follows_a_moved_folder(run, flux_base, tmp_path):
    for part in ("image_encoder", "image_embedder", "feature_extractor"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / "moved" / part).symlink_to(run / "model" / part)
    (tmp_path / "moved" / "model_index.json").write_text((run / "model" / "model_index.json").read_text())
    redux.main(["--link", str(tmp_path / "moved"), "--base", str(flux_base)])
    assert FluxPriorReduxPipeline.from_pretrained(tmp_path / "moved").text_encoder_2 is not None
    with pytest.raises(FileNotFoundError, match="not a FLUX folder"):
        redux_model.link(tmp_path / "moved", tmp_path)
