"""Run a 16-bit model on prompts, block by block, and keep what each group of linears reads."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ArgumentError, ModelError
from engine.models import loading
from engine.models.catalogue import ModelSpec
from engine.models.families import runner
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.inputs import Inputs
from engine.quantize.lockstep import ask, run_together
from engine.quantize.streamed import StreamedModel
from engine.request import Request

__all__ = ["check_prompts", "collect", "starts_from_words"]

_ROWS = 2048
# Pictures on their way at a time. Each holds its activations on the device, some 60 MB in FLUX.1 at 1024 pixels.
_AT_ONCE = 64
_PICTURES = {"control_image", "image", "mask_image"}


def check_prompts(
    spec: ModelSpec, prompts: Sequence[str], size: int | None = None, steps: int | None = None
) -> list[Request]:
    """A request for each prompt, with its number as seed; `size` is pixels of a side, None the model's default.

    Raises ArgumentError for a model that needs more than words, RequestError for a prompt or number that is none.
    """
    if prompts and not starts_from_words(spec):
        raise ArgumentError(
            f"calib: {spec.name} is told by pictures what to paint, which prompts cannot give; quantize it without data"
        )
    wanted = (Request(text, seed=seed, steps=steps, width=size, height=size) for seed, text in enumerate(prompts))
    return [request.resolved(spec) for request in wanted]


def starts_from_words(spec: ModelSpec) -> bool:
    """Whether a prompt is all that `spec` needs to paint."""
    import diffusers

    takes = inspect.signature(getattr(diffusers, spec.pipeline).__call__).parameters
    return not (spec.runner or _PICTURES & set(takes))


@torch.inference_mode()
def collect(
    streamed: StreamedModel,
    spec: ModelSpec,
    requests: Sequence[Request],
    device: torch.device,
    on_call: Callable[[int, int], None],
) -> Iterator[tuple[str, dict[LinearGroup, Inputs]]]:
    """Paint the requests and give, block by block, what every group of the block read.

    All pictures go through a block before the next one is read from the files. `on_call` hears (blocks run for a
    picture, all of them).
    """
    streamed.fill_rest()
    collectors = _Painter(streamed, spec, requests, device, on_call).paint_all()
    for block in streamed.blocks:
        found: dict[LinearGroup, Inputs] = {}
        for group in streamed.groups[block]:
            rows, largest = collectors.pop(group).take()
            if not (rows.isfinite().all() and largest.isfinite().all()):
                raise ModelError(f"{spec.name}: {group.title} read NaN or infinity while painting; its weights are bad")
            found[group] = Inputs(rows, largest)
        yield block, found


class _Collector:
    """Keeps an even sample of at most `_ROWS` rows, and the largest magnitude a channel over all rows."""

    def __init__(self, per_call: int) -> None:
        self.per_call = per_call
        self.rows: dict[tuple[int, int], Tensor] = {}
        self.largest: Tensor | None = None
        self._fresh: list[tuple[tuple[int, int], Tensor]] = []

    def see(self, x: Tensor, call: tuple[int, int], number: int) -> None:
        """Take rows of x (..., K): those of call (picture, its call), which is the `number`th one of all."""
        flat = x.detach().reshape(-1, x.shape[-1])
        largest = torch.linalg.vector_norm(flat, torch.inf, 0).float()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        # Shifting the start from call to call visits every token position in the end, with no random numbers.
        stride = max(1, len(flat) // self.per_call)
        self._fresh.append((call, flat[number % stride :: stride][: self.per_call].to(loading.DTYPE, copy=True)))

    def settle(self) -> None:
        """Bring the rows of the last calls to the CPU: all of them in one copy, since each one waits for the device."""
        if self._fresh:
            rows = torch.cat([found for _, found in self._fresh]).cpu()
            pieces = rows.split([len(found) for _, found in self._fresh])
            self.rows |= {call: piece for (call, _), piece in zip(self._fresh, pieces, strict=True)}
        self._fresh.clear()

    def take(self) -> tuple[Tensor, Tensor]:
        """Rows (S, K) in the order of the pictures, not that of their coming, in the model's type; maxima (K)."""
        assert self.largest is not None
        rows = torch.cat([self.rows[call] for call in sorted(self.rows)])
        return rows[:: max(1, len(rows) // _ROWS)][:_ROWS].clone(), self.largest.cpu()


class _Painter:
    """Paints pictures side by side with a model whose blocks come one at a time."""

    def __init__(
        self,
        streamed: StreamedModel,
        spec: ModelSpec,
        requests: Sequence[Request],
        device: torch.device,
        on_call: Callable[[int, int], None],
    ) -> None:
        self.streamed, self.spec, self.requests, self.device = streamed, spec, requests, device
        self.runner, self.on_call, self.done = runner(spec), on_call, 0
        self.steps = int(requests[0].steps or 1)
        with loading.LOADING:
            self.pipe = loading.pipeline(spec, streamed.model, device, None)
        self.texts = [self.runner.encode(self.pipe, spec, request, device) for request in requests]
        if all(self.texts):  # else the pipeline reads the prompts itself, later
            _drop_encoders(self.pipe)
        calls = max(1, len(requests) * self.steps)
        per_call = max(1, -(-_ROWS // calls))
        self.collectors = {group: _Collector(per_call) for groups in streamed.groups.values() for group in groups}
        self.calls: Counter[tuple[int, int]] = Counter()
        self.now = ((0, 0), 0)
        # Without BF16 instructions a CPU takes less than half the time in float32 (AVX2: 75 instead of 182 ms a block).
        self._widen = device.type == "cpu" and not loading.has_bf16_instructions()

    def paint_all(self) -> dict[LinearGroup, _Collector]:
        """Paint all requests; the model is left as it was."""
        hooks = self._watch()
        try:
            for start in range(0, len(self.requests), _AT_ONCE):
                self._paint(range(start, min(start + _AT_ONCE, len(self.requests))))
        finally:
            for hook in hooks:
                hook.remove()
            for block in self.streamed.blocks:
                del self.streamed.model.get_submodule(block).forward
        return self.collectors

    def _paint(self, pictures: range) -> None:
        """Paint some of the requests together."""
        pipes = [loading.pipeline(self.spec, self.streamed.model, self.device, self.pipe) for _ in pictures]
        works = [self._work(index, pipe) for index, pipe in zip(pictures, pipes, strict=True)]
        run_together(works, lambda place, calls: self._serve(place, pictures.start, calls))

    def _work(self, index: int, pipe: Any) -> Callable[[], None]:
        def work() -> None:
            wanted = self.requests[index]
            # The first picture begins with a step that reaches from pure noise to the end.
            for request in (replace(wanted, steps=1), wanted) if index == 0 else (wanted,):
                self.runner.denoise(pipe, self.spec, request, self.texts[index], lambda *args: args[-1])

        return work

    def _watch(self) -> list[Any]:
        """Let blocks stop and linears be watched."""
        hooks = []
        for place, block in enumerate(self.streamed.blocks):
            # Bound now: the loop variable moves on.
            def stop(*args: Any, _place: int = place, **kwargs: Any) -> Any:
                return ask(_place, (args, kwargs))

            self.streamed.model.get_submodule(block).forward = stop
            for group in self.streamed.groups[block]:
                linear = get_linear(self.streamed.model, group.names[0])
                hooks.append(linear.register_forward_pre_hook(self._observer(self.collectors[group])))
        return hooks

    def _observer(self, collector: _Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: collector.see(args[0], *self.now)

    def _serve(self, place: int, first: int, calls: list[tuple[int, Any]]) -> list[Any]:
        """Run one block for all pictures that have come to it."""
        answers, run = [], _in_float32 if self._widen else _as_it_is
        with self.streamed.block(self.streamed.blocks[place]) as module:
            if self._widen:
                module.to(torch.float32)
            for task, (args, kwargs) in calls:
                picture = first + task
                count = self.calls[place, picture]
                self.calls[place, picture] += 1
                self.now = (picture, count), picture * self.steps + count + (picture > 0)
                answers.append(run(module, args, kwargs))
                self.done += 1
                self.on_call(self.done, len(self.streamed.blocks) * (len(self.requests) * self.steps + 1))
        for group in self.streamed.groups[self.streamed.blocks[place]]:
            self.collectors[group].settle()
        return answers


def _as_it_is(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _in_float32(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same for a module that was widened; what comes out is in the model's type again."""
    args, kwargs = _cast((args, kwargs), loading.DTYPE, torch.float32)
    return _cast(type(module).forward(module, *args, **kwargs), torch.float32, loading.DTYPE)


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """Tensors of type `old` in a nest of tuples, lists and dictionaries as `new`."""
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, old, new) for part in value)
    return {key: _cast(part, old, new) for key, part in value.items()} if isinstance(value, dict) else value


def _drop_encoders(pipe: Any) -> None:
    """Text encoders have done their work; the memory is for blocks."""
    for name in [name for name in pipe.components if name.startswith("text_encoder")]:
        setattr(pipe, name, None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
