"""LoRAs on a loaded model: several at once, each with a strength that can change between two calls.

In 4-bit layers a LoRA's ranks stand beside the layer's own, so the 4-bit weights stay as they are. The strengths of
all LoRAs are numbers in one small tensor that every layer reads: changing one costs a single kernel, whatever the
size of the model. Layers in 16 bits get the delta added to their weight, of which the original is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.files import TensorFiles
from engine.errors import ArgumentError, CheckpointError
from engine.graphs import forget
from engine.linear import AWQLinear, SVDQuantLinear
from engine.lora.dense import DenseMerge, NormSwap
from engine.lora.detect import detect_format
from engine.lora.folded import into_folded, out_of_folded
from engine.lora.fuse import add_ranks, pad_rank
from engine.lora.targets import Target, find_targets, folded_of, transformer_of
from engine.lora.weights import LoraWeights, read_lora
from engine.residency import go_home

__all__ = [
    "LoadedLora",
    "list_loras",
    "load_lora",
    "load_loras",
    "set_lora_strength",
    "set_lora_strengths",
    "unload_lora",
]

_BANK = "_nibble_loras"


@dataclass
class LoadedLora:
    """A LoRA on a model: its strength, and which of its modules match nothing or were left out."""

    name: str
    strength: float
    weights: LoraWeights
    unmatched: list[str] = field(default_factory=list)


def load_lora(
    model: Any, path: str | Path | LoraWeights, strength: float = 1.0, name: str | None = None, *, strict: bool = True
) -> LoadedLora:
    """Load a LoRA onto an Engine, a pipeline or a transformer, beside those that are there.

    `path` is a file of any format; `name` (default: the file's) is what the other functions call it by. Modules that
    match nothing in the model are an error unless `strict` is off; then they are listed in the result's `unmatched`.
    Raises CheckpointError when the file cannot be used, ArgumentError for a name in use or a strength that is none.
    """
    return load_loras(model, [(path, strength, name)], strict=strict)[0]


@torch.no_grad()
def load_loras(
    model: Any, loras: Sequence[tuple[str | Path | LoraWeights, float, str | None]], *, strict: bool = True
) -> list[LoadedLora]:
    """Load several LoRAs, given as (path, strength, name), in one go; arguments and errors as for `load_lora`."""
    transformer = transformer_of(model)
    bank = _bank(transformer)
    added: list[LoadedLora] = []
    for path, strength, name in loras:
        name = name or (Path(path).stem if isinstance(path, str | Path) else "lora")
        if name in bank.loras or any(name == other.name for other in added):
            raise ArgumentError(f"name: a LoRA called {name!r} is loaded already; unload it or choose another name")
        weights = path if isinstance(path, LoraWeights) else _read(path, transformer)
        unmatched = bank.unmatched(weights)
        if unmatched and strict:
            more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
            raise CheckpointError(
                f"{name}: {len(unmatched)} of its modules match nothing in the model: {', '.join(unmatched[:5])}{more};"
                " it is for another model, or load it with strict=False"
            )
        added.append(LoadedLora(name, _checked(strength), weights, unmatched))
    before = dict(bank.loras)
    bank.loras |= {lora.name: lora for lora in added}
    try:
        bank.rebuild()
    except BaseException:
        bank.loras = before
        bank.rebuild()
        raise
    return added


def set_lora_strength(model: Any, name: str, strength: float) -> None:
    """Change how much a loaded LoRA counts; 0 switches it off. Raises ArgumentError for an unknown name."""
    set_lora_strengths(model, {name: strength})


@torch.no_grad()
def set_lora_strengths(model: Any, strengths: Mapping[str, float]) -> None:
    """Change several strengths at once; errors as for `set_lora_strength`."""
    bank = _bank(transformer_of(model))
    checked = {name: _checked(strength) for name, strength in strengths.items()}
    for name in checked:
        bank.get(name)
    for name, strength in checked.items():
        bank.loras[name].strength = strength
    bank.apply_strengths()


@torch.no_grad()
def unload_lora(model: Any, name: str | None = None) -> None:
    """Take one LoRA away, or all of them; without any, outputs are those of before, bit for bit.

    Raises ArgumentError for an unknown name.
    """
    bank = _bank(transformer_of(model))
    if name is None:
        bank.loras.clear()
    else:
        bank.get(name)
        del bank.loras[name]
    bank.rebuild()


def list_loras(model: Any) -> list[LoadedLora]:
    """The LoRAs on a model, in the order they were loaded."""
    return list(_bank(transformer_of(model)).loras.values())


class _Bank:
    """All LoRAs of one transformer, and what they changed in it."""

    def __init__(self, transformer: nn.Module) -> None:
        self.loras: dict[str, LoadedLora] = {}
        self._transformer = transformer
        self._targets = list(find_targets(transformer))
        self._folded = folded_of(transformer)
        self._extended: list[SVDQuantLinear | AWQLinear] = []
        self._biased: list[SVDQuantLinear | AWQLinear] = []
        self._bias_table = self._bias_sum = torch.empty(0)
        self._merges: list[DenseMerge] = []
        self._norms: list[NormSwap] = []
        self._table = self._owner = self._scales = torch.empty(0)

    def get(self, name: str) -> LoadedLora:
        """The LoRA called `name`; raises ArgumentError."""
        if name not in self.loras:
            raise ArgumentError(f"name: no LoRA called {name!r} is loaded; there is {', '.join(self.loras) or 'none'}")
        return self.loras[name]

    def unmatched(self, weights: LoraWeights) -> list[str]:
        """Modules of a LoRA that this model does not have, and keys of its file that say nothing to us."""
        matched = {name for target in self._targets for name in target.sources(weights)}
        matched |= {name for name in weights.norms if _normed(self._transformer, name) is not None}
        return [*(name for name in weights.modules if name not in matched), *weights.unknown]

    def rebuild(self) -> None:
        """Bring every layer in line with the list of LoRAs."""
        go_home(self._transformer)
        self._restore()
        forget(self._transformer)  # a recorded graph reads the layers as they were
        loras = [into_folded(lora.weights, self._folded) for lora in self.loras.values()]
        plans = [(target, _ranks(target, loras)) for target in self._targets if type(target.layer) is not nn.Linear]
        self._make_scales([(target, ranks) for target, ranks in plans if ranks])
        biased: list[tuple[SVDQuantLinear | AWQLinear, list[tuple[int, Tensor]]]] = []
        for target in self._targets:
            biases = [(i, bias) for i, lora in enumerate(loras) if (bias := target.bias(lora)) is not None]
            if type(target.layer) is nn.Linear:
                deltas = [(i, found) for i, lora in enumerate(loras) if (found := target.factors(lora)) is not None]
                if deltas or biases:
                    self._merges.append(DenseMerge(self._transformer, target, deltas, biases))
            elif biases and isinstance(target.layer, SVDQuantLinear | AWQLinear):
                biased.append((target.layer, biases))
        self._make_biases(biased)
        for index, lora in enumerate(loras):
            for name, value in lora.norms.items():
                if (module := _normed(self._transformer, name)) is not None:
                    self._norms.append(NormSwap(name, module, index, value))
        self.apply_strengths()

    def apply_strengths(self) -> None:
        """Make the strengths of the list those that the layers use."""
        go_home(self._transformer)
        if self._has_moved():
            self.rebuild()
            return
        strengths = [lora.strength for lora in self.loras.values()]
        if self._scales.numel():
            self._table.copy_(torch.tensor([1.0, *strengths]))
            torch.index_select(self._table, 0, self._owner, out=self._scales)
        if self._biased:
            on = torch.tensor(strengths, device=self._bias_table.device)
            self._bias_sum.copy_(on @ self._bias_table)
        for merge in self._merges:
            merge.apply(strengths)
        for swap in self._norms:
            swap.apply(strengths)
            forget(self._transformer)  # not a change in place

    def _has_moved(self) -> bool:
        """Whether the model went to another device since its layers were given slices of tensors here."""
        changed, tensors = (self._extended, self._scales) if self._extended else (self._biased, self._bias_table)
        return bool(changed) and next(changed[0].buffers()).device != tensors.device

    def _restore(self) -> None:
        for layer in self._extended:
            layer.extend_branch(None, None, None)
        for layer in self._biased:
            layer.bias_delta = None
        for change in (*self._merges, *reversed(self._norms)):
            change.restore()
        self._extended, self._biased, self._merges, self._norms = [], [], [], []

    def _make_scales(self, plans: list[tuple[Target, list[tuple[int, Any]]]]) -> None:
        """Extend the layers; all their scales are slices of one tensor, filled from the table of strengths."""
        owners: list[int] = []
        slices = []
        for target, ranks in plans:
            own = target.layer.own_rank if isinstance(target.layer, SVDQuantLinear) else 0
            start = len(owners)
            owners += [0] * own
            for index, factors in ranks:
                owners += [index + 1] * factors.down.shape[0]
            slices.append(slice(start, len(owners)))
        device = next(plans[0][0].layer.buffers()).device if plans else torch.device("cpu")
        self._table = torch.ones(1 + len(self.loras), device=device)
        self._owner = torch.tensor(owners, dtype=torch.long, device=device)
        self._scales = torch.ones(len(owners), device=device)
        for (target, ranks), where in zip(plans, slices, strict=True):
            whole = add_ranks([factors for _, factors in ranks])
            layer: Any = target.layer
            layer.extend_branch(whole.down, whole.up, self._scales[where])
            self._extended.append(layer)

    def _make_biases(self, biased: list[tuple[SVDQuantLinear | AWQLinear, list[tuple[int, Tensor]]]]) -> None:
        """Give the layers slices of one vector, the product of the strengths and a matrix with a row for each LoRA."""
        if not biased:
            return
        first = biased[0][0]
        device, total = next(first.buffers()).device, sum(layer.out_features for layer, _ in biased)
        table, start = torch.zeros(len(self.loras), total), 0
        self._bias_sum = torch.zeros(total, dtype=first.dtype, device=device)
        for layer, found in biased:
            where = slice(start, start + layer.out_features)
            for index, bias in found:
                table[index, where] = bias
            layer.bias_delta = self._bias_sum[where]
            self._biased.append(layer)
            start = where.stop
        self._bias_table = table.to(device)


def _ranks(target: Target, loras: Sequence[LoraWeights]) -> list[tuple[int, Any]]:
    found = [(index, target.factors(lora)) for index, lora in enumerate(loras)]
    return [
        (index, pad_rank(type(factors)(factors.down.float(), factors.up.float())))
        for index, factors in found
        if factors is not None
    ]


def _bank(transformer: nn.Module) -> _Bank:
    if not hasattr(transformer, _BANK):
        # Not a submodule and not a buffer: it must not show up in state_dict.
        object.__setattr__(transformer, _BANK, _Bank(transformer))
    return getattr(transformer, _BANK)


def _normed(model: nn.Module, name: str) -> nn.Module | None:
    """The norm called `name`, None where the model has none with weights."""
    try:
        found = model.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(getattr(found, "weight", None), Tensor) else None


def _read(path: str | Path, transformer: nn.Module) -> LoraWeights:
    from engine.checkpoint.hub import resolve

    path = resolve(path)
    with TensorFiles(path) as files:
        if detect_format(files) != "nunchaku":
            return read_lora(path)
        from engine.lora.model_source import ModelSource
        from engine.lora.published import from_runtime

        lora = from_runtime({name: files[name] for name in files}, ModelSource(transformer, files.path))
        return out_of_folded(lora, folded_of(transformer))


def _checked(strength: float) -> float:
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ArgumentError(f"strength: expected a finite number, got {strength!r}")
    return float(strength)
