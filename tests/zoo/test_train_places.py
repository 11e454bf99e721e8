"""The aid that asks the text encoder where things are."""

from __future__ import annotations

import torch

from zoo.train import flow
from zoo.train.places import LOOKS, Places, centres, order_told, present
from zoo.train.pool import TOKEN_CLASSES


def test_centres_of_painted_tokens():
    tokens = torch.zeros(1, 4, 4, dtype=torch.uint8)
    tokens[0, 0, 0] = 1  # top left: look 0
    tokens[0, 3, 2:] = 6  # bottom, right half: look 5
    where, seen = centres(tokens.flatten(1))
    assert seen.nonzero().tolist() == [[0, 0], [0, 5]]
    assert where[0, 0].tolist() == [-0.75, -0.75]
    assert where[0, 5].tolist() == [0.5, 0.75]
    assert not where[0, 1].any()


def test_a_look_is_present_in_either_size():
    labels = torch.zeros(2, 128, dtype=torch.uint8)
    labels[0, 2 * 7 + 1] = 1
    labels[1, 2 * 3] = labels[1, 64] = 1  # the second half tells materials and does not count
    assert present(labels).nonzero().tolist() == [[0, 7], [1, 3]]
    assert LOOKS == TOKEN_CLASSES - 1 == 32


def test_it_learns_to_read_left_and_right():
    """A word before two objects tells their places, and the answer comes to follow it."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    words = torch.nn.Embedding(6, 32)  # 2: first is left, 3: first is right, 4 and 5: the objects
    mix = torch.nn.GRU(32, 32, batch_first=True)
    places = Places(32, heads=2)
    parameters = [*words.parameters(), *mix.parameters(), *places.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)

    def batch(n: int) -> tuple[torch.Tensor, ...]:
        left = torch.randint(2, (n,), generator=generator)
        ids = torch.stack([3 - left, torch.full_like(left, 4), torch.full_like(left, 5)], 1)
        tokens = torch.zeros(n, 4, 4, dtype=torch.uint8)
        tokens[torch.arange(n), 1, 3 * (1 - left)] = 1
        tokens[torch.arange(n), 1, 3 * left] = 2
        labels = torch.zeros(n, 128)
        labels[:, [0, 2]] = 1
        return ids, tokens.flatten(1), labels

    for _ in range(250):
        ids, tokens, labels = batch(64)
        named, apart = places.loss(mix(words(ids))[0], ids, labels, tokens)
        optimizer.zero_grad()
        (named + apart).backward()
        optimizer.step()
    ids, tokens, _ = batch(200)
    assert order_told(places, mix(words(ids))[0], ids, tokens) > 0.95
    assert apart < 0.35  # 1.1 for the best answer that does not read: the middle


def test_padding_and_empty_prompts_do_not_count():
    torch.manual_seed(0)
    places, states = Places(32, heads=2).eval(), torch.randn(2, 5, 32)
    ids = torch.tensor([[5, 6, 1, 0, 0], [1, 0, 0, 0, 0]])
    changed = states.clone()
    changed[:, 3:] += 1
    assert torch.allclose(places(states, ids)[1][0], places(changed, ids)[1][0], atol=1e-6)
    labels, tokens = torch.zeros(2, 128), torch.ones(2, 16)
    alone = places.loss(states[:1], ids[:1], labels[:1], tokens[:1])
    both = places.loss(states, ids, labels, tokens)
    assert torch.allclose(both[0], alone[0] / 2, atol=1e-5)
    assert torch.allclose(both[1], alone[1] / 2, atol=1e-5)


def test_a_part_of_the_noise_levels_is_high():
    g = torch.Generator().manual_seed(0)
    plain, noisy = (flow.sample_sigmas(8000, 0.6, g, noisy=part) for part in (0.0, 0.5))
    assert ((noisy > 0.9).float().mean() - (plain > 0.9).float().mean()) > 0.15
    assert noisy.max() <= 1
