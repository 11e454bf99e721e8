"""norm_quantize, rotate_heads and add_linear_ on the CPU: what the fused kernels stand in for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from engine import ops
from engine.errors import ArgumentError
from tests.ops.cases import Case, random_linear

K = 128


@pytest.fixture
def modulated() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, scale, shift = (torch.randn(*shape, generator=draw) for shape in ((2, 5, K), (2, K), (2, K)))
    return x, scale, shift


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_the_same_as_the_norm_and_then_each_layer(modulated, mode: str):
    x, scale, shift = modulated
    packs = [ops.pack(random_linear(Case(1, 48, K, rank)), "reference") for rank in (16, 32)]
    acts = ops.norm_quantize(x, scale, shift, 1e-6, packs, mode)
    normed = F.layer_norm(x, (K,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    for act, packed in zip(acts, packs, strict=True):
        wanted = ops.quantize_act(normed, packed, mode)
        assert all(torch.equal(a, b) for a, b in zip(act, wanted, strict=True))
        y = ops.linear(act, packed, torch.float32)
        assert torch.equal(y.view(2, 5, 48), ops.svdq_linear(normed, packed, mode))
        gelu = ops.linear(act, packed, torch.float32, gelu=True)
        assert torch.equal(gelu, F.gelu(y, approximate="tanh"))


def test_wrong_arguments_are_named(modulated):
    x, scale, shift = modulated
    packed = ops.pack(random_linear(Case(1, 48, K, 16)), "reference")
    with pytest.raises(ArgumentError, match=r"shift: expected \(B, K\) beside x"):
        ops.norm_quantize(x, scale, shift[:1], 1e-6, [packed], "int8")
    with pytest.raises(ArgumentError, match="layers: expected one or two, got 3"):
        ops.norm_quantize(x, scale, shift, 1e-6, [packed] * 3, "int8")


def test_a_layer_is_added_to_a_stream_in_place(modulated):
    y, gate, _ = modulated
    packed = ops.pack(random_linear(Case(1, K, K, 16)), "reference")
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2))
    wanted = x + gate[:, None] * ops.svdq_linear(y, packed, "int8")
    assert not ops.adds_at_once(x, gate, packed)
    ops.add_linear_(x, gate, y, packed, "int8")
    assert torch.equal(x, wanted)
    for name, parts in (("x", (x[:, :4], gate)), ("gate", (x, gate[:1]))):
        with pytest.raises(ArgumentError, match=rf"{name}: expected \("):
            ops.add_linear_(*parts, y, packed, "int8")


@pytest.mark.parametrize("words", [0, 3])
def test_heads_are_normed_and_turned_as_diffusers_does(words: int):
    draw = torch.Generator().manual_seed(1)
    made = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    heads, head, length = 3, 16, 5
    qkv, text = made(2, length, 3 * heads * head), made(2, words, 3 * heads * head) if words else None
    norms, angles = [made(head) for _ in range(4 if words else 2)], made(words + length, head // 2)
    rotary: tuple = tuple(part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin()))
    query, key, value = ops.rotate_heads(qkv, text, norms, *rotary, 1e-6)
    split = lambda x: [part.unflatten(-1, (heads, head)) for part in x.chunk(3, dim=-1)]  # noqa: E731
    sources = [(split(qkv), norms[:2])] if text is None else [(split(text), norms[2:]), (split(qkv), norms[:2])]
    for i, got in ((0, query), (1, key)):
        joined = torch.cat([F.rms_norm(parts[i], (head,), weights[i], 1e-6) for parts, weights in sources], dim=1)
        torch.testing.assert_close(got, apply_rotary_emb(joined, rotary, sequence_dim=1))
    assert torch.equal(value, torch.cat([parts[2] for parts, _ in sources], dim=1))
