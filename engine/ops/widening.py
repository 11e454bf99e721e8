"""Weights of Hopper's product for many tokens: 4-bit codes as e4m3, widened for each product, ahead of it, or for good.

    with noted() as order: model(...)       # what a call widens, in order
    with ahead(order): model(...)           # the same call, while it is recorded as a CUDA graph

A pass over the weights of a layer takes 7 to 25 us, during which hardly anything multiplies. In a graph it needs no
turn of its own: on another stream it fills what kernels leave idle at their beginnings and ends, a few layers before
its product, into buffers that take turns. Bits are the same, since widening depends on nothing but the weights.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from engine.ops.calls import check, kernels, scale_dtype
from engine.ops.spec import Spec

__all__ = ["Layer", "ahead", "drop", "keep", "noted", "used", "weights", "widened"]

# From so many tokens on a product is faster with weights that were widened to 8 bits first (csrc/cuda/sm90a/widen.cuh).
WIDE_FROM = 1024
BUFFERS = 4  # of weights that are ahead of their products
Layer = tuple[weakref.ref[Tensor], Spec]  # a packed layer's bytes and what lies where in them


def weights(tokens: int, blob: Tensor, spec: Spec) -> Tensor:
    """What the product of so many tokens reads beside a layer's own bytes; nothing where that does not pay."""
    if (found := _kept.get(blob) if len(_kept) else None) is not None:
        return found
    # NVFP4 has groups of 16, which the product for few tokens does not know.
    pays = tokens >= WIDE_FROM or "raw_most" in spec.sections
    if not pays or not tokens:
        return blob.new_empty(0)
    if (order := getattr(_now, "order", None)) is not None:
        order.append((weakref.ref(blob), spec))
    schedule: _Ahead | None = getattr(_now, "schedule", None)
    found = None if schedule is None else schedule.weights(blob)
    return widened(blob, spec) if found is None else found


def used(wide: Tensor) -> None:
    """Say that the product which reads `wide` is on its way."""
    schedule: _Ahead | None = getattr(_now, "schedule", None)
    if schedule is not None:
        schedule.used(wide)


def size(spec: Spec) -> int:
    """Bytes: N K, and N 128 for each 64 ranks."""
    n, k = _extent(spec)
    return n * k + -(-spec.rank // 64) * n * 128


def widened(blob: Tensor, spec: Spec, out: Tensor | None = None) -> Tensor:
    """The weights in e4m3 and the up-projection in their units, in the first bytes of `out` if that is given."""
    parts, base, (n, k) = spec.sections, blob.data_ptr(), _extent(spec)
    nvfp4 = "raw_most" in parts
    wide = torch.empty(size(spec), dtype=torch.uint8, device=blob.device) if out is None else out
    names = ("codes", "scales", "raw_most" if nvfp4 else "row_most", "up", "row_most")
    addresses = (*(base + parts[name].offset for name in names), wide.data_ptr())
    with torch.cuda.device(blob.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().widen_fp8_sm90a(addresses, (n, k, spec.rank), scale_dtype(spec), nvfp4, stream))
    return wide


def _extent(spec: Spec) -> tuple[int, int]:
    n, k = (blocks * 64 for blocks in spec.sections["codes"].shape[:2])
    return n, k


# What is kept of layers whose weights shall not be widened for every product again, by their buffers.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def keep(blob: Tensor, spec: Spec) -> Tensor:
    """Widen the weights of a layer once and for all; the result lives as long as `blob`, or until drop."""
    _kept[blob] = wide = widened(blob, spec)
    return wide


def drop(blob: Tensor) -> None:
    """Undo keep."""
    _kept.pop(blob, None)


_now = threading.local()  # of this thread: `order`, what is widened; `schedule`, an _Ahead


@contextlib.contextmanager
def noted() -> Iterator[list[Layer]]:
    """The layers that are widened within, in their order."""
    before, _now.order = getattr(_now, "order", None), []
    try:
        yield _now.order
    finally:
        _now.order = before


@contextlib.contextmanager
def ahead(order: Sequence[Layer]) -> Iterator[None]:
    """Within, while a graph is recorded, widen these layers before they are asked for in this order.

    A layer that is asked for out of turn, and all after it, are widened as they are without this; so are all of them
    where one is gone.
    """
    layers = [(blob, spec) for known, spec in order if (blob := known()) is not None]
    if not layers or len(layers) < len(order):
        yield
        return
    schedule = _now.schedule = _Ahead(layers)
    try:
        yield
    finally:
        _now.schedule = None
        schedule.join()


class _Ahead:
    """Widening on a stream of its own; buffers go round, each used again once the product that read it is done."""

    def __init__(self, order: Sequence[tuple[Tensor, Spec]]) -> None:
        device = order[0][0].device
        self._order, self._stream = order, torch.cuda.Stream(device)
        largest = max(size(spec) for _, spec in order)
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]
        self._ready: list[torch.cuda.Event] = []  # of each layer that is widened or on its way
        self._done: dict[int, torch.cuda.Event] = {}  # of each layer's product
        self._asked = 0
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def weights(self, blob: Tensor) -> Tensor | None:
        """The bytes of the next layer, for which the current stream waits; None if `blob` is another."""
        turn = self._asked
        if turn >= len(self._order) or self._order[turn][0] is not blob:
            self._asked = len(self._order)
            return None
        self._asked += 1
        self._widen(turn + BUFFERS)
        if turn >= len(self._ready):  # a product that was asked for before has not been sent on its way
            self._asked = len(self._order)
            return None
        torch.cuda.current_stream(blob.device).wait_event(self._ready[turn])
        return self._buffers[turn % BUFFERS]

    def used(self, wide: Tensor) -> None:
        """Note that the product of a buffer's latest layer is on its way."""
        for at, buffer in enumerate(self._buffers):
            if buffer.data_ptr() == wide.data_ptr():
                turn = max(turn for turn in range(self._asked) if turn % BUFFERS == at)
                self._done[turn] = event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(wide.device))

    def join(self) -> None:
        """Let the current stream wait for what was begun, as a graph's end must."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _widen(self, until: int) -> None:
        while len(self._ready) < min(until, len(self._order)):
            turn = len(self._ready)
            if turn >= BUFFERS:
                if turn - BUFFERS not in self._done:
                    return
                self._stream.wait_event(self._done[turn - BUFFERS])
            blob, spec = self._order[turn]
            with torch.cuda.stream(self._stream):
                widened(blob, spec, self._buffers[turn % BUFFERS])
            self._ready.append(event := torch.cuda.Event())
            event.record(self._stream)
