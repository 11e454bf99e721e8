"""The aid that asks the text encoder where things are."""

from __future__ import annotations

import torch

from zoo import scenes
from zoo.scenes import geometry
from zoo.train import captions, flow
from zoo.train.places import LOOKS, Places, ahead, centres, order_told, present, stated_told, weighed
from zoo.train.pool import TOKEN_CLASSES

LEFT, RIGHT, FRONT, BEHIND = (1 + scenes.RELATIONS.index(name) for name in ("left", "right", "front", "behind"))


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
        relations = torch.zeros(n, 2, 3, dtype=torch.int64)
        relations[:, 0] = torch.stack([torch.zeros_like(left), torch.where(left == 1, LEFT, RIGHT), 0 * left + 1], 1)
        return ids, tokens.flatten(1), labels, relations

    for _ in range(250):
        ids, tokens, labels, relations = batch(64)
        terms = places.loss(mix(words(ids))[0], ids, labels, tokens, relations)
        optimizer.zero_grad()
        weighed(terms).backward()
        optimizer.step()
    ids, tokens, _, relations = batch(200)
    states = mix(words(ids))[0]
    assert order_told(places, states, ids, tokens) > 0.95
    assert stated_told(places, states, ids, relations)["left_right"] > 0.95
    assert "front_behind" not in stated_told(places, states, ids, relations)
    assert terms["apart"] < 0.35  # 1.1 for the best answer that does not read: the middle


def test_the_order_that_a_relation_asks_for():
    where = torch.zeros(1, LOOKS, 2)
    where[0, 3], where[0, 7] = torch.tensor([-0.5, 0.2]), torch.tensor([0.5, -0.1])  # look 3 is left, lower: in front
    for kind, gap in ((LEFT, 1.0), (RIGHT, -1.0), (FRONT, 0.3), (BEHIND, -0.3)):
        relations = torch.tensor([[[3, kind, 7], [0, 0, 0]]])
        assert torch.allclose(ahead(where, relations), torch.tensor([[gap, 0.0]]))
        assert torch.allclose(ahead(where, relations.flip(2)), torch.tensor([[-gap, 0.0]]))


def test_what_captions_state_is_so_in_the_picture():
    drawn = scenes.sample(300, 3)
    stated = captions.relations(drawn, scenes.describe(drawn, 1)).long()
    look = drawn.shape * len(scenes.COLORS) + drawn.color
    seen = geometry.project(drawn, drawn.position)[..., :2]
    where = torch.zeros(len(drawn), LOOKS, 2)
    for slot in range(look.shape[1]):
        rows = torch.nonzero(drawn.count > slot).squeeze(1)
        where[rows, look[rows, slot]] = seen[rows, slot]
    right, kind = ahead(where, stated) > 0, stated[..., 1]
    across, along = (kind == LEFT) | (kind == RIGHT), kind >= FRONT
    assert across.sum() > 80
    assert right[across].all()
    assert along.sum() > 40
    assert right[along].float().mean() > 0.85  # a small object in front of a large one can be seen higher up
    assert not stated[drawn.count == 1].any()


def test_padding_and_empty_prompts_do_not_count():
    torch.manual_seed(0)
    places, states = Places(32, heads=2).eval(), torch.randn(2, 5, 32)
    ids = torch.tensor([[5, 6, 1, 0, 0], [1, 0, 0, 0, 0]])
    changed = states.clone()
    changed[:, 3:] += 1
    assert torch.allclose(places(states, ids)[1][0], places(changed, ids)[1][0], atol=1e-6)
    known = torch.zeros(2, 128), torch.ones(2, 16), torch.tensor([[[3, LEFT, 7], [0, 0, 0]]]).repeat(2, 1, 1)
    alone = places.loss(states[:1], ids[:1], *(each[:1] for each in known))
    both = places.loss(states, ids, *known)
    assert torch.allclose(both["named"], alone["named"] / 2, atol=1e-5)
    assert torch.allclose(both["apart"], alone["apart"] / 2, atol=1e-5)
    assert torch.allclose(both["order"], alone["order"], atol=1e-5)  # a mean over what is stated
    silent = places.loss(states, ids, known[0], known[1], torch.zeros(2, 2, 3, dtype=torch.int64))
    assert silent["order"] == 0


def test_a_part_of_the_noise_levels_is_high():
    g = torch.Generator().manual_seed(0)
    plain, noisy = (flow.sample_sigmas(8000, 0.6, g, noisy=part) for part in (0.0, 0.5))
    assert ((noisy > 0.9).float().mean() - (plain > 0.9).float().mean()) > 0.15
    assert noisy.max() <= 1
