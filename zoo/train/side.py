"""LoRA at a strength that changes from call to call, in training: `Strengthened` is lora.LoraLinear with a strength for
each row of a batch. Finished files go onto models by engine.lora.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.train import lora


class Strengthened(lora.LoraLinear):
    """y = x W^T + b + s (x A^T) B^T, a strength s for each row. Shares its parameters with the layer it replaces."""

    def __init__(self, layer: lora.LoraLinear, strength: torch.Tensor) -> None:
        nn.Module.__init__(self)
        for name, value in layer.named_parameters():
            self.register_parameter(name, value)
        if layer.bias is None:
            self.bias = None
        self.register_buffer("strength", strength, persistent=False)  # (B,), one tensor for all layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.strength.view(-1, *([1] * (x.ndim - 1)))
        return F.linear(x, self.weight, self.bias) + rows.to(x.dtype) * F.linear(F.linear(x, self.lora_A), self.lora_B)


def strengthen(transformer: nn.Module, rows: int) -> torch.Tensor:
    """Give every LoRA layer of a transformer strengths. Returns the tensor (rows,) to write them to, all 1 at first.

    A tensor of one row serves batches of any size. Moving the module elsewhere breaks the tie to the tensor.
    """
    layers = lora.layers(transformer)
    strength = torch.ones(rows, device=next(iter(layers.values())).weight.device)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, Strengthened(layer, strength))
    return strength
