"""Where the GPU is lent call by call (ZeroGPU of Hugging Face Spaces), a job runs in a fork of this process.

The engines are loaded before the page is served, onto a CUDA that `spaces` emulates; each job then gets a fork in which
the GPU is real. What the fork yields comes back pickled, and what it changes is lost with it: a job carries all that
it depends on (a LoRA's strength, say) in its request.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from engine import Request
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from apps.common.pool import Pool
    from apps.common.runner import Event, Job

__all__ = ["borrow", "here", "seconds"]

# Estimates, not measurements, and on the safe side: a run that outlasts what it asked for is ended. Seconds of one
# step of 1024x1024 in 16 bits; FLUX's is about 130 TFLOP.
_STEP = {"flux": 1.0, "sana": 0.25}
_SMALL_STEP = 0.1
# Of 4-bit layers, which run through plain torch on a GPU.
_FOUR_BIT = 2.0
# The fork, text encoders and VAE; and a GiB of weights on its way to the GPU.
_START, _GIB = 5.0, 0.5
# Fields of a job that stay in this process.
_AT_HOME = ("stop", "claimed", "pool", "values", "judge")


def here() -> bool:
    """Whether this process runs on ZeroGPU; `spaces` asks the same."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")


def seconds(spec: ModelSpec, request: Request, precisions: Sequence[str]) -> int:
    """How long the GPU is asked for: it follows from steps, size, model and precisions."""
    # Attention grows with the square of the area: four times the area takes about six times as long.
    area = ((request.width or 0) * (request.height or 0) / 2**20) ** 1.3
    step = _SMALL_STEP if spec.ships else _STEP[spec.family] * area
    # One step more to warm up, and one for text and VAE.
    once = ((request.steps or 0) + 2) * step
    whole = sum(once * (1.0 if precision == "bf16" else _FOUR_BIT) for precision in precisions)
    return math.ceil(_START + _GIB * spec.download_gib + whole)


def borrow(pools: Sequence[Pool]) -> None:
    """Load the pools' engines now, in this thread, and have every job borrow the GPU.

    Call it before the page is served: ZeroGPU counts the functions that want a GPU then, and takes the weights over.
    """
    import spaces

    from apps.common import runner

    def paint(which: int, cargo: dict[str, Any]) -> Iterator[Event]:
        yield from runner.on_device(pools[which], runner.Job(**cargo))

    def duration(which: int, cargo: dict[str, Any]) -> int:
        return seconds(pools[which].spec, cargo["request"], cargo["precisions"])

    lent = spaces.GPU(paint, duration=duration)  # pyright: ignore[reportArgumentType, reportCallIssue]
    for which, pool in enumerate(pools):
        with _unpinned():
            pool.load()
        pool.lent = partial(_relay, partial(lent, which))


def _unpinned() -> AbstractContextManager[Any]:
    """Pinned memory is plain memory inside: safetensors takes it on the way to CUDA, and the emulation has none."""
    from torch.overrides import TorchFunctionMode

    class Unpinned(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})

    return Unpinned()


def _relay(paint: Callable[..., Any], job: Job) -> Iterator[Event]:
    """What comes back from the fork, and an end for each precision whatever happens to it."""
    from apps.common.runner import Failed, Finished, Stopped, judged

    left = list(job.precisions)
    if job.stop.is_set():
        yield from map(Stopped, left)
        return
    with closing(paint(_cargo(job))) as painting:
        try:
            for event in painting:
                shown = judged(event, job)
                if isinstance(event, Finished | Failed | Stopped):
                    left.remove(event.precision)
                yield shown
                if job.stop.is_set():
                    break
        except Exception as error:
            # No quota left, no GPU free in time: the columns say so, and the page shows the hub's own note besides.
            yield from (Failed(precision, _said(error)) for precision in left)
            raise
    yield from map(Stopped, left)


def _cargo(job: Job) -> dict[str, Any]:
    """The fields of a job that a fork needs; the others are locks and engines, or the page's own."""
    taken = {field.name: getattr(job, field.name) for field in fields(job) if field.name not in _AT_HOME}
    return taken | {"values": {}}


def _said(error: Exception) -> str:
    from apps.common.trouble import sentence

    # Errors of gradio carry words for the visitor.
    return str(getattr(error, "message", "")) or sentence(error)
