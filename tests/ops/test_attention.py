"""Attention with 8-bit probabilities and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine import ops
from engine.ops.attention import EIGHT_BIT_FROM


def test_it_is_near_to_exact_attention():
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 70, 3, 32, generator=draw)
    got = ops.attention_8bit(query, key, value)
    wanted = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
    wanted = wanted.transpose(1, 2).flatten(2)
    assert got.shape == wanted.shape
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.04


def test_8_bits_are_taken_where_they_are_asked_for_or_pay():
    many, cpu = EIGHT_BIT_FROM, torch.device("cpu")
    assert ops.in_8bit("8bit", 1, cpu)
    assert not ops.in_8bit("16bit", many, cpu)
    assert not ops.in_8bit("auto", many, cpu)  # plain torch gains nothing by them
