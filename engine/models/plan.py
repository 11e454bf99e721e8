"""Which linears of a model become 4-bit, and how they belong together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from engine.errors import ModelError

__all__ = ["AWQ_TENSORS", "SVDQ_TENSORS", "LinearGroup", "get_linear", "replace_module"]

SVDQ_TENSORS = ("codes", "wscales", "smooth")
AWQ_TENSORS = ("codes", "scales", "zeros")


@dataclass(frozen=True)
class LinearGroup:
    """Linears of the model that read one and the same input.

    They share a smooth factor (K) and a low-rank down-projection (R, K), so one quantization of the input serves
    all of them. `names` are diffusers module names; `fused` is where their row-concatenation is installed, if the
    model can run it in one piece. `unsigned` marks inputs that are GELU outputs (checkpoint-format: GELU shift).
    """

    names: tuple[str, ...]
    kind: Literal["svdq", "awq"] = "svdq"
    unsigned: bool = False
    fused: str | None = None

    @property
    def title(self) -> str:
        """Short name for progress lines and reports."""
        return self.fused or self.names[0]


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the nn.Linear called `name`; raises ModelError when it is absent or something else."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {name!r}") from error
    if not isinstance(module, nn.Linear):
        raise ModelError(f"{name}: expected an nn.Linear, found {type(module).__name__}")
    return module


def replace_module(model: nn.Module, name: str, new: nn.Module | None) -> None:
    """Put `new` where `name` was; None removes it."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if new is None:
        delattr(parent, leaf)
    elif isinstance(parent, nn.ModuleList):
        parent[int(leaf)] = new
    else:
        setattr(parent, leaf, new)
