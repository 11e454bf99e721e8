"""Attention in 8 bits: near to exact attention, whatever all keys have in common."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import Engine, ops
from engine.errors import ArgumentError
from engine.models.attention import set_attention


def inputs(words: int, common: float = 0.0) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor, Tensor]:
    """Projections of 2 x (words + 70) tokens to three heads of 32, norms and angles."""
    draw = torch.Generator().manual_seed(3)
    made = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    qkv, text = made(2, 70, 288), made(2, words, 288) if words else None
    qkv[..., 96:192] += common * made(96)
    norms = [torch.ones(32) + 0.2 * made(32) for _ in range(4 if words else 2)]
    angles = made(words + 70, 16) * (0.01 if common else 1)
    return qkv, text, norms, *(part.repeat_interleave(2, dim=1) for part in (angles.cos(), angles.sin()))


def exact(qkv: Tensor, text: Tensor | None, norms: list[Tensor], *rotary: Tensor) -> Tensor:
    query, key, value = (part.transpose(1, 2) for part in ops.rotate_heads(qkv, text, norms, *rotary, 1e-6))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("words", [0, 9])
def test_it_is_near_to_exact_attention(words: int):
    parts = inputs(words)
    got, wanted = ops.attention_8bit(*parts, 1e-6), exact(*parts)
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.06


def test_what_all_keys_have_in_common_costs_nothing():
    parts = inputs(0, common=6.0)
    assert (ops.attention_8bit(*parts, 1e-6) - exact(*parts)).norm() < 0.06 * exact(*parts).norm()


def test_it_is_an_option_of_four_bit_flux():
    for model, precision in (("tiny", "bf16"), ("tiny-sana", "int4")):
        with pytest.raises(ArgumentError, match="attention: expected 16bit, got '8bit'"):
            Engine.load(model, precision, device="cpu", attention="8bit")
    engine = Engine.load("tiny", "int4", device="cpu", attention="8bit")
    blocks = [*engine.pipe.transformer.transformer_blocks, *engine.pipe.transformer.single_transformer_blocks]
    assert all(block.attn.eight_bit for block in blocks)
    with pytest.raises(ArgumentError, match="attention: expected 16bit or 8bit, got 'fp8'"):
        set_attention(engine.pipe.transformer, "fp8")
