"""Which layers of a loaded model a LoRA goes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ArgumentError, CheckpointError
from engine.linear import AWQLinear, SVDQuantLinear
from engine.lora.fuse import FUSED, part_factors, stack_rows
from engine.lora.weights import Factors, LoraWeights

__all__ = ["Target", "find_targets", "folded_of", "transformer_of"]

Layer = SVDQuantLinear | AWQLinear | nn.Linear


@dataclass(frozen=True)
class Target:
    """A layer, and the diffusers linears whose rows it stacks."""

    name: str
    layer: Layer
    parts: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Outputs of each part."""
        return self.layer.out_features // len(self.parts)

    def factors(self, lora: LoraWeights) -> Factors | None:
        """The LoRA's factors for this layer, None when it has none. Raises CheckpointError when shapes differ."""
        return stack_rows([self._part(lora, part) for part in self.parts], [self.rows] * len(self.parts))

    def bias(self, lora: LoraWeights) -> Tensor | None:
        """The LoRA's bias delta (N), None when it has none."""
        found = [_bias(lora, part) for part in self.parts]
        if all(bias is None for bias in found):
            return None
        for part, bias in zip(self.parts, found, strict=True):
            if bias is not None and bias.numel() != self.rows:
                raise CheckpointError(f"{part} has {self.rows} outputs, but its LoRA's bias {bias.numel()}")
        return torch.cat([torch.zeros(self.rows) if bias is None else bias.float() for bias in found])

    def sources(self, lora: LoraWeights) -> set[str]:
        """Names under which the LoRA holds something for this layer."""
        return {name for part in self.parts for name in _names(part) if name in lora.factors or name in lora.biases}

    def _part(self, lora: LoraWeights, part: str) -> Factors | None:
        k = self.layer.in_features
        own = lora.factors.get(part)
        if own is not None and own.down.shape[1] != k and _may_widen(self, own.down.shape[1]):
            return own
        if own is not None and isinstance(self.layer, SVDQuantLinear) and 0 < k - own.down.shape[1] < 64:
            # The layer was widened to whole groups of 64 inputs; the added ones count for nothing.
            own = Factors(nn.functional.pad(own.down, (0, k - own.down.shape[1])), own.up)
            return part_factors(LoraWeights({part: own}), part, self.rows, k)
        return part_factors(lora, part, self.rows, k)


def find_targets(model: nn.Module) -> Iterator[Target]:
    """Every linear of the model, 4-bit or not, with fused ones taken for what they stack."""
    for name, module in model.named_modules():
        if isinstance(module, SVDQuantLinear | AWQLinear | nn.Linear):
            fused = next((leaf for leaf in FUSED if name.endswith(f".{leaf}")), None)
            block = name.removesuffix(fused) if fused else ""
            yield Target(name, module, tuple(block + leaf for leaf in FUSED[fused]) if fused else (name,))


def folded_of(model: nn.Module) -> dict[str, Tensor]:
    """Output projections whose smooth factor (K) is in the rows of V, with that factor."""
    found = {n: m.folded_smooth for n, m in model.named_modules() if isinstance(m, SVDQuantLinear)}
    return {name: smooth for name, smooth in found.items() if smooth is not None}


def transformer_of(model: Any) -> nn.Module:
    """The transformer inside an Engine or a diffusers pipeline, or `model` itself when it is one."""
    pipe = getattr(model, "pipe", model)
    found = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(found, nn.Module):
        raise ArgumentError(f"model: expected an Engine, a pipeline or a transformer, got {type(model).__name__}")
    return found


def _may_widen(target: Target, k: int) -> bool:
    """Control LoRAs give the first layer more input channels than the base model has."""
    return target.name == "x_embedder" and type(target.layer) is nn.Linear and k > target.layer.in_features


def _names(part: str) -> list[str]:
    names = [part]
    parent, _, half = part.rpartition(".")
    if parent.endswith(".proj_out") and half in ("attn", "mlp"):
        names.append(parent)
    names += [
        part.removesuffix(leaf) + fused
        for fused, leaves in FUSED.items()
        for leaf in leaves
        if part.endswith(f".{leaf}")
    ]
    return names


def _bias(lora: LoraWeights, part: str) -> Tensor | None:
    # proj_out's delta goes to its MLP half, which holds its bias.
    return lora.biases.get(part.removesuffix(".mlp") if part.endswith(".proj_out.mlp") else part)
