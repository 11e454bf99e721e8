"""The FP8 rival computes what the layer that it replaces does, within what three bits of mantissa allow."""

from __future__ import annotations

import torch
from torch import nn

from bench.fp8_linear import Fp8Linear, replace_linears


def test_a_layer_is_near_the_one_it_replaces():
    torch.manual_seed(0)
    layer, x = nn.Linear(128, 64, dtype=torch.bfloat16), torch.randn(3, 32, 128, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, found = layer(x).float(), Fp8Linear(layer)(x).float()
    assert found.shape == wanted.shape
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.06


def test_blocks_are_replaced_and_modulation_is_not():
    block = nn.ModuleDict({"proj": nn.Linear(32, 32), "norm1": nn.ModuleDict({"linear": nn.Linear(32, 64)})})
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block]), "x_embedder": nn.Linear(32, 32)})
    replace_linears(model)
    found = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert found == {"transformer_blocks.0.proj"}
