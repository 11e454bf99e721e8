"""Run a 16-bit model on prompts and keep what each group of linears reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.models.plan import LinearGroup, get_linear
from engine.quantize.layer import Inputs
from engine.request import Request

__all__ = ["collect"]

_ROWS = 2048


class _Collector:
    """Keeps an even sample of at most `_ROWS` rows, and the largest magnitude a channel over all rows."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.largest: Tensor | None = None

    def see(self, x: Tensor, per_call: int) -> None:
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        largest = flat.abs().amax(0)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        # Shifting the start from call to call visits every token position in the end, with no random numbers.
        stride = max(1, len(flat) // per_call)
        self.rows.append(flat[len(self.rows) % stride :: stride][:per_call].clone())

    def inputs(self) -> Inputs:
        assert self.largest is not None
        rows = torch.cat(self.rows)
        return Inputs(rows[:: max(1, len(rows) // _ROWS)][:_ROWS], self.largest)


@torch.inference_mode()
def collect(
    engine: Any,
    model: nn.Module,
    groups: Sequence[LinearGroup],
    prompts: Iterable[str],
    on_prompt: Callable[[int], None] | None = None,
) -> dict[LinearGroup, Inputs]:
    """Generate a picture for each prompt with `engine` and return what every group of `model` read."""
    prompts = list(prompts)
    collectors = {group: _Collector() for group in groups}
    calls = max(1, len(prompts) * int(engine.spec.steps.default))
    per_call = max(1, -(-_ROWS // calls))
    hooks = [_watch(get_linear(model, group.names[0]), collectors[group], per_call) for group in groups]
    try:
        for seed, prompt in enumerate(prompts):
            engine.run(Request(prompt, seed=seed))
            if on_prompt:
                on_prompt(seed + 1)
    finally:
        for hook in hooks:
            hook.remove()
    return {group: collector.inputs() for group, collector in collectors.items()}


def _watch(linear: nn.Linear, collector: _Collector, per_call: int) -> Any:
    return linear.register_forward_pre_hook(lambda _, args: collector.see(args[0], per_call))
