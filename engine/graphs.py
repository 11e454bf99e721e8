"""A transformer's forward recorded as a CUDA graph: one launch a step in place of a thousand, and the same bits.

    recorder = record(transformer)      # from the second call of a shape on, calls replay what the first ones did
    recorder.forget()                   # after a change of weights that is not made in place
    with unrecorded(model): ...         # hooks inside the model are called, which a replay knows nothing of

What cannot be recorded (inputs that are no plain tensors, a model whose parts come and go) runs as before.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine import lanes
from engine.ops import widening

__all__ = ["Recorder", "forget", "record", "unrecorded"]

_PLAIN = (bool, int, float, str, type(None))
Key = tuple[Any, ...]


def record(model: nn.Module) -> Recorder:
    """Let calls of `model` be recorded and replayed; a model that has a recorder keeps it."""
    found = model.__dict__.get("forward")
    if not isinstance(found, Recorder):
        found = Recorder(model)
        object.__setattr__(model, "forward", found)
    return found


def forget(model: nn.Module) -> None:
    """Drop what was recorded of `model`, if anything was."""
    if isinstance(found := model.__dict__.get("forward"), Recorder):
        found.forget()


@contextlib.contextmanager
def unrecorded(model: nn.Module) -> Iterator[None]:
    """Forget what was recorded of `model`, and let its calls run as they are meanwhile: for hooks on its layers."""
    forget(model)
    found = model.__dict__.get("forward")
    if not isinstance(found, Recorder):
        yield
        return
    before, found.paused = found.paused, True
    try:
        yield
    finally:
        found.paused = before


class Recorder:
    """Stands in for a model's `forward`. The first call of a shape runs as it is, which warms kernels up; the second is
    recorded. The shapes used last are kept, each with the memory of its activations."""

    KEPT = 2

    def __init__(self, model: nn.Module) -> None:
        self._model, self._forward = model, model.forward
        self._attention = [part for part in model.modules() if hasattr(part, "processor")]
        # Of a shape that was seen once, what its call widened.
        self._seen: OrderedDict[Key, _Recording | list[widening.Layer]] = OrderedDict()
        self.refused = ""
        self.paused = False
        functools.update_wrapper(self, self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = None if self.refused or self.paused else self._key(args, kwargs)
        if key is None:
            return self._forward(*args, **kwargs)
        found = self._seen.get(key)
        if found is None:
            with widening.noted() as order:
                out = self._forward(*args, **kwargs)
            self._keep(key, order)
            return out
        recording = found if isinstance(found, _Recording) else self._record(args, kwargs, found)
        if recording is None:
            return self._forward(*args, **kwargs)
        self._keep(key, recording)
        return recording(args, kwargs)

    def forget(self) -> None:
        """Drop all recordings."""
        self._seen.clear()

    @property
    def recordings(self) -> int:
        """How many shapes are recorded now."""
        return sum(isinstance(found, _Recording) for found in self._seen.values())

    def _keep(self, key: Key, found: _Recording | list[widening.Layer]) -> None:
        self._seen[key] = found
        self._seen.move_to_end(key)
        while len(self._seen) > self.KEPT:
            self._seen.popitem(last=False)

    def _key(self, args: tuple, kwargs: Mapping[str, Any]) -> Key | None:
        """What a recording depends on, or None where a call cannot be recorded."""
        first = next(self._model.parameters(), None)
        if first is None or not first.is_cuda or hasattr(self._model, "_hf_hook"):
            return None
        # Processors come and go (perturbed attention), and some have settings.
        key: list[Any] = [first.data_ptr()]
        for part in self._attention:
            key += (type(part.processor), str(vars(part.processor)))
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                if value.device != first.device:
                    return None
                key.append((name, value.shape, value.dtype))
            elif isinstance(value, _PLAIN) or value == {}:
                key.append((name, str(value)))
            else:
                return None
        return tuple(key)

    def _record(self, args: tuple, kwargs: Mapping[str, Any], order: list[widening.Layer]) -> _Recording | None:
        try:
            device = next(self._model.parameters()).device
            return _Recording(device, self._forward, args, kwargs, order)
        except (RuntimeError, TypeError) as error:
            self.refused = f"{type(error).__name__}: {error}"
            logging.getLogger(__name__).warning("steps run without a CUDA graph: %s", self.refused)
            return None


class _Recording:
    """A graph, the tensors it reads and those it writes."""

    def __init__(
        self,
        device: torch.device,
        forward: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        order: Sequence[widening.Layer],
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._args = [_own(value) for value in args]
            self._kwargs = {name: _own(value) for name, value in kwargs.items()}
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize(device)
            with torch.cuda.device(device):
                stream = torch.cuda.Stream(device)
                # Other threads may load models meanwhile.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    out = self._recorded(forward, order)
        if not isinstance(out, tuple) or not all(isinstance(part, Tensor) for part in out):
            raise TypeError(f"expected a tuple of tensors from the model, got {type(out).__name__}")
        self._out: tuple[Tensor, ...] = out

    def _recorded(self, forward: Any, order: Sequence[widening.Layer]) -> Any:
        try:
            with widening.ahead(order):
                return forward(*self._args, **self._kwargs)
        except BaseException:
            lanes.join_all()
            raise

    def __call__(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        for mine, value in zip(self._args, args, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(value)
        for name, mine in self._kwargs.items():
            if isinstance(mine, Tensor):
                mine.copy_(kwargs[name])
        self._graph.replay()
        return tuple(part.clone() for part in self._out)


def _own(value: Any) -> Any:
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
