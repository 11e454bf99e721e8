"""LoRAs on layers that stay in 16 bits: merged into the weight, with the original kept for the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ArgumentError, CheckpointError
from engine.lora.targets import Target
from engine.lora.weights import Factors

__all__ = ["DenseMerge", "NormSwap"]


class DenseMerge:
    """One nn.Linear with W = original + sum of strength * up @ down, and the same for its bias.

    `deltas` and `biases` carry the index of the LoRA they belong to. A LoRA that reads more input channels than the
    layer has (FLUX control LoRAs on x_embedder) widens the layer with zero columns.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        deltas: Sequence[tuple[int, Factors]],
        biases: Sequence[tuple[int, Tensor]],
    ) -> None:
        layer = target.layer
        if not isinstance(layer, nn.Linear):
            raise ArgumentError(f"{target.name}: expected an nn.Linear, got {type(layer).__name__}")
        self._layer, self._model = layer, model
        self._weight, self._bias = layer.weight, layer.bias
        self._width = layer.in_features
        device = layer.weight.device
        width = max([self._width, *(found.down.shape[1] for _, found in deltas)])
        # All LoRAs as one: ranks side by side, and whose each is, so that a new strength costs one product.
        self._down = _joined([F.pad(f.down.float(), (0, width - f.down.shape[1])) for _, f in deltas], 0, device)
        self._up = _joined([found.up.float() for _, found in deltas], 1, device)
        owners = [index for index, found in deltas for _ in range(len(found.down))]
        self._owner = torch.tensor(owners, dtype=torch.long, device=device)
        self._biases = [(i, bias.to(device, torch.float32)) for i, bias in biases]
        self._base = F.pad(self._weight.detach().float(), (0, width - self._width))
        layer.weight = nn.Parameter(self._base.to(self._weight.dtype), requires_grad=False)
        if self._biases:
            like = torch.zeros(layer.out_features, device=device) if self._bias is None else self._bias.detach()
            layer.bias = nn.Parameter(like.to(self._weight.dtype, copy=True), requires_grad=False)
        self._set_width(width)

    def apply(self, strengths: Sequence[float]) -> None:
        """Set weight and bias for these strengths, in place."""
        if self._up is not None and self._down is not None:
            scales = torch.tensor(strengths, device=self._up.device)[self._owner]
            self._layer.weight.data.copy_(torch.addmm(self._base, self._up * scales, self._down))
        if self._biases:
            base = torch.zeros_like(self._biases[0][1]) if self._bias is None else self._bias.detach().float()
            for index, bias in self._biases:
                base = base + strengths[index] * bias
            self._layer.bias.data.copy_(base)

    def restore(self) -> None:
        """Put the original parameters back."""
        _follow(self._weight, self._layer.weight)
        if self._bias is not None:
            _follow(self._bias, self._layer.weight)
        self._layer.weight, self._layer.bias = self._weight, self._bias
        self._set_width(self._width)

    def _set_width(self, width: int) -> None:
        if width == self._layer.in_features:
            return
        self._layer.in_features = width
        model: Any = self._model
        if hasattr(model, "register_to_config"):
            # Pipelines ask the config how many channels to prepare.
            model.register_to_config(in_channels=width)


def _follow(parameter: Tensor, like: Tensor) -> None:
    """The model may have gone to another device meanwhile, and this parameter was not in it."""
    parameter.data = parameter.data.to(like.device)


def _joined(parts: Sequence[Tensor], dim: int, device: torch.device) -> Tensor | None:
    return torch.cat(list(parts), dim).to(device) if parts else None


class NormSwap:
    """A norm weight that a LoRA replaces; there is no half-way, so any strength but 0 uses the new one."""

    def __init__(self, name: str, module: nn.Module, index: int, value: Tensor) -> None:
        self._module, self._index = module, index
        self._original = module.weight
        like = module.weight.detach()  # pyright: ignore[reportCallIssue]
        if value.shape != like.shape:
            raise CheckpointError(
                f"{name} has {like.numel()} weights, but its LoRA {value.numel()}; it was made for another model"
            )
        self._new = nn.Parameter(value.to(like.device, like.dtype), requires_grad=False)

    def apply(self, strengths: Sequence[float]) -> None:
        """Use the new weight or the original one."""
        wanted = self._new if strengths[self._index] else self._original
        _follow(wanted, self._module.weight)  # pyright: ignore[reportArgumentType]
        self._module.weight = wanted

    def restore(self) -> None:
        """Put the original parameter back."""
        _follow(self._original, self._module.weight)  # pyright: ignore[reportArgumentType]
        self._module.weight = self._original
