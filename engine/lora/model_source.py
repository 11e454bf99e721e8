"""The low-rank factors of a loaded model under their canonical names, to tell a converted LoRA from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine import ops
from engine.checkpoint.quantization import Quantization
from engine.errors import CheckpointError
from engine.linear import SVDQuantLinear
from engine.lora.targets import find_targets

__all__ = ["ModelSource"]


class ModelSource:
    """`lora_down` and `lora_up` of every 4-bit linear, as engine.checkpoint.source.Source gives them."""

    def __init__(self, transformer: nn.Module, path: Path) -> None:
        self.path = path
        self._where: dict[str, tuple[SVDQuantLinear, slice]] = {}
        self._last: tuple[SVDQuantLinear, ops.CanonicalLinear] | None = None
        weight, rank = "int4", 0
        for target in find_targets(transformer):
            if isinstance(target.layer, SVDQuantLinear):
                weight, rank = target.layer.packed.kind, target.layer.own_rank
                for index, part in enumerate(target.parts):
                    self._where[part] = (target.layer, slice(index * target.rows, (index + 1) * target.rows))
        config: Any = getattr(transformer, "config", {})
        plain = {key: value for key, value in dict(config).items() if not key.startswith("_")}
        self.metadata = Quantization(type(transformer).__name__, plain, weight, 64, rank).metadata()

    def __iter__(self) -> Iterator[str]:
        return (f"{name}.{part}" for name in self._where for part in ("lora_down", "lora_up"))

    def __contains__(self, name: object) -> bool:
        return any(name == other for other in self)

    def __getitem__(self, name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        if part not in ("lora_down", "lora_up"):
            raise CheckpointError(
                f"{self.path}: it holds a bias for {module}, which only the checkpoint's file tells apart from its own;"
                " load the LoRA it was converted from"
            )
        if module not in self._where:
            raise CheckpointError(f"{self.path}: the model has no 4-bit linear {module!r}, which this LoRA is for")
        layer, rows = self._where[module]
        if self._last is None or self._last[0] is not layer:
            self._last = (layer, ops.unpack(layer.packed))
        linear, own = self._last[1], layer.own_rank
        if linear.lora_down is None or linear.lora_up is None:
            raise CheckpointError(f"{self.path}: {module} has no low-rank branch")
        return (linear.lora_down[:own] if part == "lora_down" else linear.lora_up[rows, :own]).cpu()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a factor."""
        return tuple(self[name].shape)

    def close(self) -> None:
        """Nothing is open."""
