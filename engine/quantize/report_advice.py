"""Which layers are worth keeping in 16 bits: a rule on the measured errors, and a trial of what it suggests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from engine.graphs import forget
from engine.models.families import family
from engine.models.plan import LinearGroup, get_linear, replace_module
from engine.quantize.records import LayerRecord

__all__ = ["RULE", "Advice", "advise", "error_of", "plan", "prepared", "put_back", "role"]

_TIMES_MEDIAN = 2.0
_LEAST_ERROR = 0.05
_MOST_GROWTH = 0.10
RULE = (
    f"A layer is suggested when its error is above {_TIMES_MEDIAN:g} times the median of all layers and above"
    f" {_LEAST_ERROR:.0%}: the largest errors first, as long as all of them together make the checkpoint at most"
    f" {_MOST_GROWTH:.0%} larger."
)


@dataclass(frozen=True)
class Advice:
    """Layers to keep in 16 bits, the patterns that keep them and the bytes that this costs.

    `outliers` counts all layers above the rule's limits, whether they fit into its allowance or not.
    """

    layers: tuple[str, ...]
    patterns: tuple[str, ...]
    added_bytes: int
    outliers: int


def advise(records: Sequence[LayerRecord], activation: str, checkpoint_bytes: int) -> Advice:
    """Apply `RULE` to the errors with the activations of the run ("w4a8" or "w4a4")."""
    ranked = sorted(records, key=lambda record: -error_of(record, activation))
    limit = max(_LEAST_ERROR, _TIMES_MEDIAN * median(error_of(r, activation) for r in records)) if records else 0.0
    outliers = [record for record in ranked if error_of(record, activation) > limit]
    chosen: list[LayerRecord] = []
    added = 0
    for record in outliers:
        more = added + _extra_bytes(record)
        if more > _MOST_GROWTH * checkpoint_bytes:
            break
        chosen.append(record)
        added = more
    names = tuple(name for record in chosen for name in (record.names or (record.name,)))
    return Advice(tuple(record.name for record in chosen), names, added, len(outliers))


def error_of(record: LayerRecord, activation: str) -> float:
    """The error with these activations, or the one that was measured; 0 where none was."""
    first, second = record.error_w4a8, record.error_w4a4
    if activation == "w4a4":
        first, second = second, first
    return first if first is not None else second or 0.0


def role(name: str) -> str:
    """A layer's name without the numbers of its block: layers of one role do the same work."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name, count=1)


def put_back(transformer: nn.Module, exact: nn.Module, records: Sequence[LayerRecord], layers: Sequence[str]) -> None:
    """Replace quantized layers of `transformer`, in place, by the 16-bit linears of `exact` (prepared)."""
    device = next(transformer.parameters()).device
    modules = dict(transformer.named_modules())
    forget(transformer)  # a recorded graph reads the layers as they were
    for record in records:
        if record.name not in layers:
            continue
        linears = {name: get_linear(exact, name) for name in record.names}
        if record.name in modules and record.name not in linears:
            replace_module(transformer, record.name, _stacked(list(linears.values()), device))
            continue
        for name, linear in linears.items():
            replace_module(transformer, name, _stacked([linear], device))


def prepared(engine: Any) -> nn.Module:
    """The engine's 16-bit transformer with its linears split as checkpoints hold them."""
    return family(engine.spec.family).leaves.prepare(engine.pipe.transformer)


def plan(engine: Any) -> list[LinearGroup]:
    """The groups of linears that a checkpoint of the engine's 16-bit model can hold."""
    return family(engine.spec.family).leaves.plan(prepared(engine))


def _stacked(linears: Sequence[nn.Linear], device: torch.device) -> nn.Linear:
    """One linear with the rows of all."""
    weight = torch.cat([linear.weight.detach() for linear in linears]).to(device)
    whole = nn.Linear(weight.shape[1], weight.shape[0], bias=linears[0].bias is not None, device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    biases: list[Tensor] = [linear.bias for linear in linears]
    if biases[0] is not None:
        whole.bias = nn.Parameter(torch.cat(biases).detach().to(device), requires_grad=False)
    return whole


def _extra_bytes(record: LayerRecord) -> int:
    """16-bit weights less the 4-bit codes; scales and branch are small beside them."""
    n, k = record.shape
    return n * k * 2 - n * k // 2
