"""A LoRA goes with its model from the CPU to the device and back, and can still be changed and taken away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import SVDQuantFluxTransformer
from engine.lora import load_lora, set_lora_strength, unload_lora
from engine.lora.weights import LoraWeights
from tests.checkpoint.test_pretrained import flux_inputs, relative
from tests.lora.conftest import FLUX, LORA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(model: torch.nn.Module) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in flux_inputs().items()}
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0].cpu()


def test_a_lora_moves_with_its_model():
    model = SVDQuantFluxTransformer.from_pretrained(FLUX, device="cpu")
    plain = run(model)
    load_lora(model, LORA / "diffusers.safetensors", 2.0, "style")
    torch.manual_seed(0)
    more = LoraWeights(
        biases={"transformer_blocks.0.attn.to_k": torch.randn(128), "norm_out.linear": torch.randn(256) * 0.1},
        norms={"transformer_blocks.0.attn.norm_q": torch.rand(128) + 0.5},
    )
    load_lora(model, more, name="more")
    wanted = run(model)
    torch.nn.Module.cuda(model)
    assert relative(run(model), wanted) < 0.05
    set_lora_strength(model, "style", 0.0)
    set_lora_strength(model, "more", 0.0)
    assert relative(run(model), plain) < 0.05
    set_lora_strength(model, "style", 2.0)
    set_lora_strength(model, "more", 1.0)
    assert relative(run(model), wanted) < 0.05
    unload_lora(model)
    bare = run(model)
    assert relative(bare, plain) < 0.05
    torch.nn.Module.cpu(model)
    assert torch.equal(run(model), plain)
