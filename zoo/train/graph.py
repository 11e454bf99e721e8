"""Mixed precision and torch.compile, with a way back to eager mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from zoo.train.dist import World

T = TypeVar("T")


def autocast(world: World) -> torch.autocast:
    """bfloat16 autocast on an accelerator; on the CPU everything stays in float32."""
    return torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=world.cuda)


@contextlib.contextmanager
def compiled(modules: list[nn.Module], enabled: bool) -> Iterator[Callable[..., T]]:
    """Compile `modules` in place (static shapes) for the duration of the context.

    Yields attempt(function, reset): it calls function() and returns its value. Should the first calls fail while
    compiled, the modules go back to eager mode, reset() is called and function() is tried once more.
    """
    state = {"on": enabled, "calls": 0}
    if enabled:
        torch._dynamo.config.suppress_errors = True  # a graph that cannot be compiled runs as it is, with a warning
        torch._dynamo.config.recompile_limit = 64  # counted over every class and gradient mode together
        for module in modules:
            module.compile(dynamic=False)

    def attempt(function: Callable[[], T], reset: Callable[[], None]) -> T:
        state["calls"] += 1
        if not state["on"] or state["calls"] > 3:
            return function()
        try:
            return function()
        except Exception as error:
            print(f"warning: compiled code failed, going on in eager mode: {type(error).__name__}: {error}", flush=True)
            _eager(modules)
            state["on"] = False
            reset()
            return function()

    try:
        yield attempt
    finally:
        if enabled:
            _eager(modules)


def _eager(modules: list[nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None
