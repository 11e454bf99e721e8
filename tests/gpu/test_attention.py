"""Hopper's attention in 8 bits beside what defines it."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.ops.attention import _plain

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs an H100 or H200"
)


@pytest.mark.parametrize(
    ("batch", "words", "length", "heads"), [(1, 0, 300, 2), (2, 77, 256, 3), (1, 5, 90, 1), (1, 512, 4096, 24)]
)
def test_it_agrees_with_the_definition(batch: int, words: int, length: int, heads: int):
    draw = torch.Generator("cuda").manual_seed(7)
    made = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")  # noqa: E731
    qkv = made(batch, length, 3 * heads * 128)
    qkv[..., heads * 128 : 2 * heads * 128] += 2 * made(heads * 128)
    text = made(batch, words, 3 * heads * 128).bfloat16() if words else None
    norms = [(1 + 0.2 * made(128)).bfloat16() for _ in range(4 if words else 2)]
    angles = made(words + length, 64)
    rotary = [part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin())]
    arguments = (qkv.bfloat16(), text, norms, *rotary, 1e-6)
    got, wanted = ops.attention_8bit(*arguments), _plain(*arguments)
    query, key, value = (part.transpose(1, 2).float() for part in ops.rotate_heads(*arguments))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    assert got.shape == exact.shape
    # A code that is rounded the other way is a sixteenth off; there are few.
    assert (got.float() - wanted.float()).norm() < 0.03 * exact.norm()
    assert (got.float() - exact).norm() < 0.07 * exact.norm()
    assert torch.equal(got, ops.attention_8bit(*arguments))
