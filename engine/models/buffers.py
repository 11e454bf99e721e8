"""Tables that a model computes when it is made and that no file holds: a model made without memory lacks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["fill_buffers"]


def fill_buffers(model: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Give `model` the values that `build` (the same model anew) computes; parameters take no memory meanwhile."""
    if not (missing := list(_missing(model))):
        return
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        whole = build()
    for owner, name in missing:
        value = getattr(whole.get_submodule(owner), name).to(device)
        place = model.get_submodule(owner)
        if name in dict(place.named_buffers(recurse=False)):
            place.register_buffer(name, value, persistent=False)
        else:
            setattr(place, name, value)


def _missing(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Owner and name of every table without memory: buffers, and tensors that are plain attributes."""
    stored = model.state_dict()
    for owner, module in model.named_modules():
        buffers = module.named_buffers(recurse=False)
        tables = {**dict(buffers), **{name: part for name, part in vars(module).items() if isinstance(part, Tensor)}}
        for name, value in tables.items():
            if value.is_meta and f"{owner}.{name}".lstrip(".") not in stored:
                yield owner, name
