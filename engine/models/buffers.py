"""Tables that a model computes when it is made and that no file holds: a model made without memory lacks them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

__all__ = ["fill_buffers"]


def fill_buffers(model: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Give `model` the values that `build` (the same model anew) computes; parameters take no memory meanwhile."""
    stored = model.state_dict()
    missing = [name for name, value in model.named_buffers() if value.is_meta and name not in stored]
    if not missing:
        return
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        whole = build()
    for name in missing:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_buffer(leaf, whole.get_buffer(name).to(device), persistent=False)
