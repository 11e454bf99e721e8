"""Hopper's attention in 8 bits beside what defines it."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.ops.attention import _plain

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs an H100 or H200"
)


@pytest.mark.parametrize("shape", [(1, 300, 2), (2, 333, 3), (1, 95, 1), (3, 64, 2), (1, 4608, 24)], ids=str)
@pytest.mark.parametrize("joint", [True, False])
def test_it_agrees_with_the_definition(shape: tuple[int, int, int], joint: bool):
    """Of views of one tensor, as a projection leaves them, and of tensors apart."""
    batch, tokens, heads = shape
    draw = torch.Generator("cuda").manual_seed(7)
    qkv = torch.randn(batch, tokens, 3, heads, 128, generator=draw, device="cuda").bfloat16()
    query, key, value = (part if joint else part.contiguous() for part in qkv.unbind(2))
    got, wanted = ops.attention_8bit(query, key, value), _plain(query, key, value)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(part.transpose(1, 2).float() for part in (query, key, value))
    )
    exact = exact.transpose(1, 2).flatten(2)
    assert got.shape == exact.shape
    # A code that is rounded the other way is a sixteenth off: probabilities are taken of the largest score so far.
    assert (got.float() - wanted.float()).norm() < 0.03 * exact.norm()
    assert (got.float() - exact).norm() < 0.05 * exact.norm()
    assert torch.equal(got, ops.attention_8bit(query, key, value))
