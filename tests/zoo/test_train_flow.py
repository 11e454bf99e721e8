"""The flow-matching core, the flat optimizer and the tokenizers, against diffusers and closed forms."""

from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from zoo.train import flow, vocab
from zoo.train.dist import World
from zoo.train.optim import Clock, Ema, FlatModel

ALONE = World(0, 1, torch.device("cpu"))


def test_packing_agrees_with_the_pipeline():
    from diffusers import FluxPipeline

    x = torch.randn(2, 16, 8, 12)
    packed = flow.pack(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, 2, 16, 8, 12))
    assert torch.equal(flow.unpack(packed, 8, 12), x)
    assert torch.equal(flow.image_ids(8, 12), FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32))


def test_packing_refuses_odd_sizes():
    with pytest.raises(ValueError, match="even"):
        flow.pack(torch.zeros(1, 16, 7, 8))
    with pytest.raises(ValueError, match="tokens"):
        flow.unpack(torch.zeros(1, 5, 64), 4, 4)


def test_shift_agrees_with_the_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = torch.linspace(0.05, 1.0, 20)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    assert torch.allclose(flow.shift_sigmas(s, 0.6), scheduler.time_shift(0.6, 1.0, s), atol=1e-6)


def test_euler_steps_along_the_true_velocity_reach_the_picture():
    x0, noise = torch.randn(3, 4, 64), torch.randn(3, 4, 64)
    x, velocity = flow.interpolate(x0, noise, torch.ones(3))
    assert torch.allclose(x, noise)
    for start, stop in ((1.0, 0.7), (0.7, 0.2), (0.2, 0.0)):
        x = x + (stop - start) * velocity
    assert torch.allclose(x, x0, atol=1e-5)


def test_noise_levels_stay_inside_and_follow_the_shift():
    g = torch.Generator().manual_seed(0)
    low, high = (flow.sample_sigmas(4000, mu, g) for mu in (0.0, 1.0))
    assert low.min() > 0
    assert high.max() <= 1
    assert abs(low.median() - 0.5) < 0.03
    assert abs(high.median() - 1 / (1 + math.exp(-1.0))) < 0.03


def test_flat_model_steps_as_adamw_does():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    b = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))
    b.load_state_dict(a.state_dict())
    flat = FlatModel(a, ALONE, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1, clip=1e9)
    matrices, vectors = [p for p in b.parameters() if p.ndim > 1], [p for p in b.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8)
    for _ in range(5):
        x = torch.randn(4, 5)
        flat.zero_grad()
        a(x).square().mean().backward()
        flat.step(1.0)
        adam.zero_grad()
        b(x).square().mean().backward()
        adam.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_channels_last_views_keep_a_convolution_the_same():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 6, 6)
    before = conv(x)
    FlatModel(conv, ALONE, lr=1e-3, channels_last=True)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(conv(x), before, atol=1e-6)


def test_a_gradient_with_a_nan_changes_no_weight_but_decay():
    model = nn.Linear(2, 2)
    flat = FlatModel(model, ALONE, lr=1.0, weight_decay=0.0)
    before = flat.flat.clone()
    flat.grad.fill_(1.0)
    flat.grad[0] = math.nan
    flat.step(1.0)
    assert torch.equal(flat.flat, before)


def test_the_average_follows_and_is_swapped_in():
    model = nn.Linear(3, 1, bias=False)
    flat = FlatModel(model, ALONE, lr=1.0)
    ema = Ema(flat)
    for value in (1.0, 2.0, 3.0):
        flat.flat.fill_(value)
        ema.update()
    assert 2.9 < ema.flat[0] < 3.0
    with ema.swapped():
        assert torch.equal(model.weight.flatten(), ema.flat[:3])
    assert model.weight.unique().tolist() == [3.0]


def test_the_clock_warms_up_decays_and_stops():
    clock = Clock(ALONE, time.time() + 3600, warmup=10, max_steps=100)
    factors = [clock.factor]
    while clock.tick():
        factors.append(clock.factor)
    assert clock.step == 100
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) > 0.9
    assert clock.factor == pytest.approx(0.01)


def test_a_clock_past_its_deadline_stops_at_the_first_step():
    assert not Clock(ALONE, time.time() - 1, warmup=1).tick()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    words = vocab.vocabulary_words(["red", "cube", "sphere", "wooden-brown", "turquoise", ","])
    vocab.build_clip(words, folder / "tokenizer")
    vocab.build_t5(words, folder / "tokenizer_2")
    return folder


@pytest.mark.parametrize(
    "text", ["", "A large RED metal sphere,\nleft of a cube.", "xylophone über 8k \N{BALLOON} 日本", "it's (odd) " * 60]
)
def test_training_and_pipeline_tokenize_alike(tokenizers, text):
    from transformers import CLIPTokenizer, T5TokenizerFast

    kinds = (CLIPTokenizer, "tokenizer", 77), (T5TokenizerFast, "tokenizer_2", 64)
    for fast, (kind, name, length) in zip(vocab.encoders(tokenizers, 64), kinds, strict=True):
        loaded = kind.from_pretrained(tokenizers / name)
        ids = loaded([text], padding="max_length", max_length=length, truncation=True).input_ids[0]
        assert fast([text])[0].tolist() == ids
        assert len(loaded) == fast.vocab_size <= 4096


def test_every_known_word_is_one_token_in_any_case(tokenizers):
    clip, t5 = vocab.encoders(tokenizers, 64)
    for word in ("red", "Cube", "SPHERE", "turquoise", "umbrella"):
        assert len(t5.tokenizer.encode(word).tokens) == 64
        assert t5([word])[0, 1] == 1
        assert clip([word])[0, 2] == clip.tokenizer.token_to_id("<|endoftext|>")
        assert (t5([word]) == t5([word.lower()])).all()
