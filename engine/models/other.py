"""Any other diffusers transformer: which of its leaves become 4-bit, told by its structure alone.

The linears inside its lists of blocks, each by itself, since nothing says which of them read the same input. Those that
make modulations of a few numbers a picture keep 16-bit activations, as FLUX's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.models.plan import LinearGroup

__all__ = ["Leaves"]

_GROUP = 64
_MODULATION = ("norm", "modulation", "adaln", "_mod", "mod_")


@dataclass(frozen=True)
class Leaves:
    """The part of a family module that engine.models.install.Family describes, for the class called `MODEL_CLASS`."""

    MODEL_CLASS: str

    def prepare(self, model: Any) -> Any:
        """Nothing to change: every linear is one already."""
        return model

    def plan(self, model: Any) -> list[LinearGroup]:
        """List the linears to replace, in the order in which the model lists them."""
        groups = []
        for name, blocks in model.named_children():
            if isinstance(blocks, nn.ModuleList):
                groups += [found for index, block in enumerate(blocks) for found in _linears(f"{name}.{index}", block)]
        return groups

    def fuse(self, model: Any) -> None:
        """Nothing is known that would make fewer calls."""


def _linears(block: str, module: nn.Module) -> list[LinearGroup]:
    found = []
    for name, part in module.named_modules():
        if type(part) is not nn.Linear or not name:
            continue
        modulation = any(word in f"{name.lower()}" for word in _MODULATION)
        if part.in_features % _GROUP == 0 and part.out_features % 4 == 0:
            found.append(LinearGroup((f"{block}.{name}",), kind="awq" if modulation else "svdq"))
    return found
