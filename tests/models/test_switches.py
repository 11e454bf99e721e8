"""What a loaded 4-bit model can be told to do otherwise."""

from __future__ import annotations

import pytest

from engine import Engine
from engine.errors import ArgumentError
from engine.models.switches import set_attention, set_wide_weights


def test_attention_in_8_bits_is_for_four_bit_flux():
    for model, precision in (("tiny", "bf16"), ("tiny-sana", "int4")):
        with pytest.raises(ArgumentError, match="attention: expected 16bit, got '8bit': only 4-bit FLUX"):
            Engine.load(model, precision, device="cpu", attention="8bit")
    engine = Engine.load("tiny", "int4", device="cpu", attention="8bit")
    blocks = [*engine.pipe.transformer.transformer_blocks, *engine.pipe.transformer.single_transformer_blocks]
    assert all(block.attn.attention == "8bit" for block in blocks)
    with pytest.raises(ArgumentError, match="attention: expected auto, 16bit or 8bit, got 'fp8'"):
        set_attention(engine.pipe.transformer, "fp8")


def test_wide_weights_are_for_hopper():
    engine = Engine.load("tiny", "int4", device="cpu")
    set_wide_weights(engine.pipe.transformer, False)
    with pytest.raises(ArgumentError, match="wide_weights: expected False, got True: only 4-bit models that stay"):
        set_wide_weights(engine.pipe.transformer, True)
