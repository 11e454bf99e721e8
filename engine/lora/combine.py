"""Several LoRAs as one, each with its strength."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import ArgumentError
from engine.lora.fuse import FUSED, add_ranks, stack_rows
from engine.lora.weights import Factors, LoraWeights

__all__ = ["compose"]


def compose(loras: Sequence[tuple[LoraWeights, float]]) -> LoraWeights:
    """The sum of LoRAs times their strengths; q, k and v come out fused as `attn.to_qkv`, which keeps the rank low.

    Norm replacements are taken from the last LoRA that has them. Raises ArgumentError when there are no LoRAs.
    """
    if not loras:
        raise ArgumentError("loras: expected at least one, got none")
    whole = LoraWeights()
    collected: dict[str, list[Factors]] = {}
    for lora, strength in loras:
        for name, factors in _fused(lora).items():
            collected.setdefault(name, []).append(Factors(factors.down * strength, factors.up))
        for name, bias in lora.biases.items():
            scaled = bias * strength
            whole.biases[name] = whole.biases[name] + scaled if name in whole.biases else scaled
        whole.norms |= lora.norms
        whole.left_out += lora.left_out
        whole.unknown += lora.unknown
    whole.factors = {name: add_ranks(parts) for name, parts in collected.items()}
    return whole


def _fused(lora: LoraWeights) -> dict[str, Factors]:
    found = dict(lora.factors)
    for fused, leaves in list(FUSED.items())[:3]:
        for block in sorted(
            {name.removesuffix(leaf) for leaf in leaves for name in lora.factors if name.endswith(f".{leaf}")}
        ):
            parts = [found.pop(block + leaf, None) for leaf in leaves]
            rows = next(part.up.shape[0] for part in parts if part is not None)
            stacked = stack_rows(parts, [rows] * len(leaves))
            if stacked is not None:
                found[block + fused] = stacked
    return found
