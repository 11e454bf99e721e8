"""SANA's kernels between the linears against torch in float64, and a fused block against diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from bench.random_models import randomly_quantized
from engine import ops
from engine.models import sana
from engine.models.sana_blocks import unfuse_blocks
from engine.ops import backends
from engine.ops import sana as passes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(backends.cuda_kernels() is None, reason="the CUDA module was not built (no nvcc)"),
]


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


@pytest.mark.parametrize(
    "sizes", [(2, 32, 32, 5600, 5632), (1, 1, 1, 2, 64), (2, 5, 19, 300, 320), (1, 33, 16, 64, 64)]
)
def test_the_middle_of_the_feed_forward(sizes: tuple[int, ...]):
    batch, height, width, channels, padded = sizes
    x = made(batch, height, width, 2 * channels)
    weight, bias = made(2 * channels, 1, 3, 3, seed=1), made(2 * channels, seed=2)
    got = ops.depthwise_glu(x, weight, bias, padded)
    wanted = passes._plain_glu(x.double().cpu(), weight.double().cpu(), bias.double().cpu(), padded)
    torch.testing.assert_close(got.double().cpu(), wanted, rtol=2**-6, atol=0.05)
    assert (got.double().cpu() - wanted).norm() <= 3e-3 * wanted.norm()
    assert torch.equal(got, ops.depthwise_glu(x, weight, bias, padded))


@pytest.mark.parametrize("sizes", [(2, 1024, 70), (1, 1, 1), (3, 300, 3), (1, 4096, 4)])
def test_linear_attention(sizes: tuple[int, ...]):
    batch, tokens, heads = sizes
    qkv = made(batch, tokens, 3 * heads * 32)
    got = ops.linear_attention(qkv, heads)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2).double() for part in qkv.chunk(3, dim=-1))
    query, key = query.relu(), key.relu()
    weight = query @ key.sum(dim=2).unsqueeze(-1) + 1e-15
    wanted = (query @ (key.transpose(-1, -2) @ value) / weight).transpose(1, 2).flatten(2)
    assert (got.double() - wanted).norm() <= 3e-3 * wanted.norm()
    assert torch.equal(got, ops.linear_attention(qkv, heads))


@torch.inference_mode()
def test_fused_blocks_are_diffusers_blocks():
    config = {
        "in_channels": 32, "out_channels": 32, "num_layers": 2, "num_attention_heads": 20, "attention_head_dim": 32,
        "num_cross_attention_heads": 10, "cross_attention_head_dim": 64, "cross_attention_dim": 640,
        "caption_channels": 64, "sample_size": 32, "patch_size": 1,
    }  # fmt: skip
    model = randomly_quantized(SanaTransformer2DModel, sana, "cuda", config, "auto", 32)
    mask = torch.ones(2, 30, device="cuda")
    mask[0, 20:] = 0
    inputs = {
        "hidden_states": made(2, 32, 16, 24), "encoder_hidden_states": made(2, 30, 64), "return_dict": False,
        "timestep": torch.full((2,), 500.0, device="cuda"), "encoder_attention_mask": mask,
    }  # fmt: skip
    fused = model(**inputs)[0].float()
    unfuse_blocks(model)
    plain = model(**inputs)[0].float()
    # Values rounded the other way move codes by a step, a sixteenth of the value.
    assert (fused - plain).norm() <= 0.05 * plain.norm()
