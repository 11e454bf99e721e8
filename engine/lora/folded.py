"""LoRAs on checkpoints whose V rows carry the smooth factor of the output projection (engine.checkpoint.folding)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from engine.checkpoint.folding import outputs
from engine.lora.fuse import FUSED
from engine.lora.weights import Factors, LoraWeights

__all__ = ["into_folded", "out_of_folded"]


def into_folded(lora: LoraWeights, folded: Mapping[str, Tensor]) -> LoraWeights:
    """`lora`, made for dense weights, as it applies to a checkpoint with V rows divided by s.

    `folded` maps output projections to s (K). There x is s times smaller, so A becomes A * s; V itself is to be s times
    smaller, so its rows of B and of a bias delta become B / s.
    """
    return _scaled(lora, {name: s.float() for name, s in folded.items()}) if folded else lora


def out_of_folded(lora: LoraWeights, folded: Mapping[str, Tensor]) -> LoraWeights:
    """The inverse of `into_folded`."""
    return _scaled(lora, {name: 1 / s.float() for name, s in folded.items()}) if folded else lora


def _scaled(lora: LoraWeights, folded: Mapping[str, Tensor]) -> LoraWeights:
    factors, biases = dict(lora.factors), dict(lora.biases)
    for name, s in folded.items():
        # A FLUX single block's projection is called by its attention half here, by its own name in LoRAs.
        for wide in {name, name.removesuffix(".attn")} & factors.keys():
            factors[wide] = _inputs(factors[wide], s)
    values = {value: s for name, s in folded.items() for value in outputs([name])[name]}
    for name, s in values.items():
        if name in factors:
            factors[name] = _rows(factors[name], s)
        if name in biases:
            biases[name] = biases[name].float() / s.to(biases[name].device)
        for fused, leaves in FUSED.items():
            whole = name.removesuffix(leaves[2]) + fused
            if name.endswith(f".{leaves[2]}") and whole in factors:
                factors[whole] = _rows(factors[whole], s)
    return replace(lora, factors=factors, biases=biases)


def _inputs(factors: Factors, s: Tensor) -> Factors:
    """A * s in the first columns: those of the attention output, where the LoRA is for a FLUX `proj_out` as a whole."""
    down = factors.down.float().clone()
    if down.shape[1] >= len(s):
        down[:, : len(s)] *= s.to(down.device)
    return Factors(down, factors.up.float())


def _rows(factors: Factors, s: Tensor) -> Factors:
    """B / s in the last rows: those of V, where the LoRA is for q, k and v as one."""
    up = factors.up.float().clone()
    if len(up) >= len(s):
        up[-len(s) :] /= s.to(up.device)[:, None]
    return Factors(factors.down.float(), up)
