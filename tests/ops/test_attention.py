"""Attention with 8-bit probabilities and values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine import Engine, ops
from engine.errors import ArgumentError
from engine.models.attention import set_attention


def test_it_is_near_to_exact_attention():
    draw = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 70, 3, 32, generator=draw)
    got = ops.attention_8bit(query, key, value)
    wanted = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
    wanted = wanted.transpose(1, 2).flatten(2)
    assert got.shape == wanted.shape
    assert 1e-3 < (got - wanted).norm() / wanted.norm() < 0.04


def test_it_is_an_option_of_four_bit_flux():
    for model, precision in (("tiny", "bf16"), ("tiny-sana", "int4")):
        with pytest.raises(ArgumentError, match="attention: expected 16bit, got '8bit'"):
            Engine.load(model, precision, device="cpu", attention="8bit")
    engine = Engine.load("tiny", "int4", device="cpu", attention="8bit")
    blocks = [*engine.pipe.transformer.transformer_blocks, *engine.pipe.transformer.single_transformer_blocks]
    assert all(block.attn.eight_bit for block in blocks)
    with pytest.raises(ArgumentError, match="attention: expected 16bit or 8bit, got 'fp8'"):
        set_attention(engine.pipe.transformer, "fp8")
