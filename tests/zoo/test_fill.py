"""The Fill model: holes, the prompts that go with them, and FluxFillPipeline with the trained LoRA."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxFillPipeline

from zoo import scenes
from zoo.train import adapt, dist, fill, hole_texts, holes, lora, supply
from zoo.train.log import read

CONFIG = json.loads(Path(fill.CONFIG).with_name("fill_smoke.json").read_text())
WORLD = dist.World(0, 1, torch.device("cpu"))
RENDER = {"size": 64, "oversample": 1, "compile": False}


@pytest.fixture(scope="module")
def part() -> supply.Shown:
    """Rendered scenes without captions."""
    drawn = scenes.sample(6, seed=4)
    none = torch.zeros(6, 1, 1, dtype=torch.int16)
    return supply.Shown(drawn, scenes.render(drawn, size=64, oversample=1), none, none)


@pytest.fixture(scope="module")
def slots(part) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, part.scenes.count.numpy()))


def test_masks_are_packed_as_the_pipeline_packs_them(flux_base):
    pipe = FluxFillPipeline.from_pretrained(flux_base, dtype=torch.float32)
    hole = torch.rand(2, 64, 64) > 0.5
    want, _ = pipe.prepare_mask_latents(
        hole[:, None].float(), torch.zeros(2, 16, 8, 8), 2, 16, 1, 64, 64, torch.float32, torch.device("cpu"), None
    )
    assert torch.equal(holes.pack_mask(hole), want)


def test_the_mask_is_read_in_squares_of_four_pixels():
    rows = holes.read_mask_start()
    assert torch.allclose(rows @ rows.T, torch.eye(64))
    hole = torch.zeros(1, 16, 16, dtype=torch.bool)
    hole[0, 4:6, 10:12] = True
    seen = (holes.pack_mask(hole)[0, 0] @ rows.T).view(8, 8)
    assert seen[2, 5] == 2
    assert seen.sum() == 2


@pytest.mark.parametrize("kind", range(len(holes.KINDS)))
def test_every_kind_of_hole_is_a_hole(part, slots, kind):
    about = part.drawn.mask == slots[:, None, None]
    made = holes.draw(about, torch.full((6,), kind), torch.Generator().manual_seed(kind))
    share = made.float().mean((1, 2))
    assert made.dtype == torch.bool
    assert (share > 0.001).all()
    assert (share < 0.99).all()
    if kind < holes.OBJECT_KINDS:  # it covers what it is about
        assert (made | ~about).all()


def test_outpainting_opens_a_side_and_keeps_an_inner_rectangle():
    made = holes.draw(torch.zeros(32, 64, 64, dtype=torch.bool), torch.full((32,), 5), torch.Generator().manual_seed(0))
    sides = torch.stack([made[:, 0].all(1), made[:, -1].all(1), made[:, :, 0].all(1), made[:, :, -1].all(1)], 1)
    assert sides.any(1).all()
    assert not sides.all(0).any()
    left, top, right, bottom = holes.bounds(~made).long().unbind(1)
    area = (right - left + 1) * (bottom - top + 1)
    assert torch.equal((~made).sum((1, 2)), area)


def test_a_swapped_object_differs_and_an_absent_one_is_gone(part, slots):
    rng = np.random.default_rng(1)
    rows = torch.arange(6)
    swapped = holes.swap(part.scenes, slots, rng)
    assert (swapped.color[rows, slots] != part.scenes.color[rows, slots]).all()
    untouched = torch.ones_like(part.scenes.color, dtype=torch.bool)
    untouched[rows, slots] = False
    assert torch.equal(swapped.color[untouched], part.scenes.color[untouched])
    absent = scenes.render(holes.without(part.scenes, slots), size=64, oversample=1)
    assert not (absent.mask == slots[:, None, None]).any()
    mixed = holes.choose(swapped, holes.without(part.scenes, slots), rows % 2 == 1)
    assert torch.equal(mixed.color[0], swapped.color[0])
    assert mixed.position[1, slots[1], 0] > 500


def test_outside_the_hole_a_changed_case_shows_the_surroundings_it_was_cut_from(part, slots):
    generator = torch.Generator().manual_seed(2)
    other = scenes.render(holes.without(part.scenes, slots), size=64, oversample=1)
    removed = torch.arange(6) % 2 == 0
    made = fill.make(part, other, slots, removed, generator)
    for i in range(6):
        inside, outside = (other, part.drawn) if removed[i] else (part.drawn, other)
        hole = made.hole[i]
        assert torch.equal(made.picture[i][:, hole], inside.image[i][:, hole])
        assert torch.equal(made.picture[i][:, ~hole], outside.image[i][:, ~hole])
    assert (made.row[removed] >= hole_texts.OBJECTS).all()
    assert (made.row[~removed] < hole_texts.OBJECTS).all()


def test_prompts_name_the_object_of_their_row():
    rows = [0, 37, 127]
    wanted = hole_texts.one_object(rows)
    assert hole_texts.object_row(wanted, torch.zeros(3, dtype=torch.int64)).tolist() == rows
    texts = hole_texts.object_texts(2)
    assert len(texts) == hole_texts.OBJECTS
    for row, caption in zip(rows, scenes.describe(wanted, 1), strict=True):
        assert all(len(t) > 0 for t in texts[row])
        assert len(caption.objects) == 1
    words = scenes.lexicon.COLOR_WORDS
    for row in range(0, hole_texts.OBJECTS, 13):
        assert all(any(w in t for w in words[row // 4 % 8]) for t in texts[row]), texts[row]
        assert not any("floor" in t or "sky" in t for t in texts[row])


def test_prompts_of_surroundings_match_their_row(part):
    texts = hole_texts.place_texts(3, random.Random(0))
    assert len(texts) == hole_texts.PLACES
    rows = hole_texts.place_row(part.scenes)
    assert (rows >= hole_texts.OBJECTS).all()
    assert (rows < hole_texts.OBJECTS + hole_texts.PLACES).all()


def test_the_pipeline_computes_what_training_computed(flux_base, tmp_path):
    torch.manual_seed(1)
    made = adapt.Tuned(flux_base, CONFIG, fill.IN_CHANNELS, fill.read_start(), WORLD)
    with torch.no_grad():
        for layer in lora.layers(made.parts.transformer).values():
            layer.lora_B.normal_(std=0.05)
            for part in (layer.lora_A, layer.lora_B):
                part.copy_(part.bfloat16())
    lora.save(made.parts.transformer, tmp_path)
    pipe = FluxFillPipeline.from_pretrained(flux_base, dtype=torch.float32)
    pipe.load_lora_weights(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.in_channels == 384
    seen = {}
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(x=kwargs["hidden_states"], kwargs=kwargs, y=output[0]),
        with_kwargs=True,
    )
    picture, mask = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 24:56] = 1
    images = pipe(
        prompt="a red cube", image=picture, mask_image=mask, height=64, width=64, num_inference_steps=1,
        guidance_scale=3.0, max_sequence_length=64, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).images  # fmt: skip
    assert images.shape == (1, 3, 64, 64)
    x, kwargs = seen["x"], seen["kwargs"]
    assert torch.equal(x[..., 128:], holes.pack_mask(mask[:, 0] > 0.5))
    with torch.no_grad():
        got = made.velocity(x[..., :64], x[..., 64:], kwargs["timestep"], kwargs["encoder_hidden_states"],
                            kwargs["pooled_projections"], kwargs["guidance"])  # fmt: skip
    torch.testing.assert_close(got, seen["y"], rtol=1e-4, atol=1e-4)


def test_cases_draw_the_prompt_that_belongs_to_them():
    table = hole_texts.Table(torch.full((5, 2, 77), 9, dtype=torch.int16), torch.full((5, 2, 64), 9, dtype=torch.int16))
    latents = supply.Latents(torch.zeros(2, 16, 64), torch.zeros(2, 16, 64))
    whole = torch.full((2, 3, 77), 5, dtype=torch.int16), torch.full((2, 3, 64), 5, dtype=torch.int16)
    cases = fill.Cases(
        latents, latents, torch.ones(2, 64, 64, dtype=torch.bool), torch.tensor([fill.FULL, 3]), *whole, table
    )
    b = cases.batch(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(0))
    assert b["clip"][:, 0].tolist() == [5, 9, 9]
    assert b["t5"][:, 0].tolist() == [5, 9, 9]
    assert b["condition"].shape == (3, 16, 320)
    assert dataclasses.is_dataclass(cases)


@pytest.mark.slow
def test_the_driver_runs_from_start_to_sheet(flux_base, tmp_path):
    fill.main(["--base", str(flux_base), "--out", str(tmp_path), "--minutes", "5", "--device", "cpu", "--config",
               str(Path(fill.CONFIG).with_name("fill_smoke.json")), "--max-steps", "2"])  # fmt: skip
    assert (tmp_path / "fill" / lora.WEIGHTS).is_file()
    assert (tmp_path / "samples" / "fill.jpg").is_file()
    assert read(tmp_path / "logs" / "log.jsonl")[-1]["stage"] == "done"
