"""The fused blocks of SANA give what diffusers' own blocks give."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

from engine.models import sana
from engine.models.sana_blocks import FusedSanaBlock, unfuse_blocks
from tests.models.test_sana import inputs, small_sana


def concatenated() -> Any:
    """Fused projections, as quantized models have them."""
    model: Any = sana.prepare(small_sana())
    for block in model.transformer_blocks:
        attn = block.attn1
        parts = [attn.to_q, attn.to_k, attn.to_v]
        attn.to_qkv = torch.nn.Linear(64, 192, bias=parts[0].bias is not None)
        attn.to_qkv.weight.data = torch.cat([part.weight for part in parts])
        if parts[0].bias is not None:
            attn.to_qkv.bias.data = torch.cat([part.bias for part in parts])
    return model.requires_grad_(False)


@torch.no_grad()
def test_the_same_output_and_a_way_back():
    given = inputs(dtype=torch.float32)
    plain, model = small_sana()(**given)[0], concatenated()
    sana.fuse(model)
    assert all(type(block) is FusedSanaBlock for block in model.transformer_blocks)
    torch.testing.assert_close(model(**given)[0], plain, rtol=1e-5, atol=1e-5)
    unfuse_blocks(model)
    assert not any(isinstance(block, FusedSanaBlock) for block in model.modules())
    torch.testing.assert_close(model(**given)[0], plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_processor_is_asked():
    given, model = inputs(dtype=torch.float32), concatenated()
    sana.fuse(model)
    asked = []

    class Counting(SanaLinearAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            asked.append(1)
            return super().__call__(*args, **kwargs)

    model.transformer_blocks[0].attn1.set_processor(Counting())
    torch.testing.assert_close(model(**given)[0], small_sana()(**given)[0], rtol=1e-5, atol=1e-5)
    assert asked == [1]


def test_training_goes_through_the_feed_forward():
    model: Any = sana.prepare(small_sana())
    weight = model.transformer_blocks[0].ff.conv_inverted.weight.requires_grad_(True)
    model(**inputs(dtype=torch.float32))[0].square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0
