"""The one-step sampler's preprocessing and its order of random draws, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from engine.errors import ArgumentError, ModelError
from engine.models.sketch import erosion, sketch_to_image, strength_by_peft, to_lines


def page(side: int, strokes: list[tuple[int, int]]) -> Image.Image:
    """A white page with black horizontal strokes (first row, thickness) over its middle half."""
    values = np.full((side, side, 3), 255, np.uint8)
    for top, thick in strokes:
        values[top : top + thick, side // 4 : 3 * side // 4] = 0
    return Image.fromarray(values)


def test_strokes_thinner_than_the_kernel_vanish_and_others_lose_three_pixels():
    lines = to_lines(page(1024, [(100, 3), (300, 7)]), 1024, 1024)
    assert lines.shape == (1, 3, 1025, 1025)
    assert set(lines.unique().tolist()) == {-1.0, 1.0}
    rows = (lines[0, 0] > 0).any(1).nonzero().flatten().tolist()
    assert len(rows) == 4
    assert min(rows) >= 300
    assert max(rows) <= 309


def test_small_pages_are_not_eroded():
    assert [erosion(side) for side in (256, 512, 1024, 2048)] == [1, 2, 4, 8]
    lines = to_lines(page(256, [(50, 1)]), 256, 256)
    assert lines.shape == (1, 3, 256, 256)
    assert (lines[0, 0, 50, 64:192] == 1).all()
    assert (lines > 0).sum() == 3 * 128


def test_pictures_and_tensors_give_the_same_lines_and_only_the_first_channel_counts():
    picture = page(64, [(20, 4)])
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
    tensor[:, 1:] = 0
    assert torch.equal(to_lines(picture, 64, 64), to_lines(tensor, 64, 64))
    with pytest.raises(ArgumentError, match="expected a tensor"):
        to_lines(tensor, 128, 128)


@pytest.fixture(scope="module")
def pipe(flux_base) -> FluxPipeline:
    return FluxPipeline.from_pretrained(flux_base, dtype=torch.float32)


def paint(pipe, alpha=0.4, **more):
    wanted = {"height": 64, "width": 64, "max_sequence_length": 64, "strength": lambda _: None, "output_type": "pt"}
    return sketch_to_image(pipe, page(64, [(20, 6)]), "a red cube", alpha, **(wanted | more))


def test_noise_is_drawn_after_the_posterior(pipe):
    seen = {}

    def spy(module, arguments, keywords):
        seen["x"] = keywords["hidden_states"].clone()

    handle = pipe.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        paint(pipe, generator=torch.Generator().manual_seed(5))
    finally:
        handle.remove()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        posterior = pipe.vae.encode(to_lines(page(64, [(20, 6)]), 64, 64)).latent_dist
        drawn = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
    encoded = (drawn - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    z = torch.randn(encoded.shape, generator=g)
    want = pipe._pack_latents(0.6 * z + 0.4 * encoded, 1, 16, 8, 8)
    torch.testing.assert_close(seen["x"], want, rtol=1e-5, atol=1e-5)


def test_alpha_is_also_the_strength(pipe):
    heard = []
    paint(pipe, alpha=0.3, strength=heard.append)
    assert heard == [0.3]


def test_at_alpha_zero_the_drawing_does_not_count(pipe):
    one = paint(pipe, alpha=0.0, generator=torch.Generator().manual_seed(1))
    blank = sketch_to_image(
        pipe, page(64, []), "a red cube", 0.0, torch.Generator().manual_seed(1), height=64, width=64,
        max_sequence_length=64, strength=lambda _: None, output_type="pt",
    )  # fmt: skip
    assert torch.equal(one, blank)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"alpha": 1.2}, "alpha"), ({"height": 60}, "multiples of 16")],
)
def test_wrong_values_are_named(pipe, wrong, message):
    with pytest.raises(ArgumentError, match=message):
        paint(pipe, **wrong)


def test_prompts_must_match_drawings(pipe):
    with pytest.raises(ArgumentError, match="one for each of 1 drawings, got 2"):
        sketch_to_image(pipe, page(64, []), ["a", "b"], 0.3, height=64, width=64)


def test_a_pipeline_without_a_lora_says_so(pipe):
    with pytest.raises(ModelError, match="load_lora_weights"):
        strength_by_peft(pipe)
