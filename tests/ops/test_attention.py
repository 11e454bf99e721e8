"""Attention with 8-bit probabilities and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine import ops


def test_it_is_near_to_exact_attention():
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 70, 3, 32, generator=draw)
    got = ops.attention_8bit(query, key, value)
    wanted = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
    wanted = wanted.transpose(1, 2).flatten(2)
    assert got.shape == wanted.shape
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.04
