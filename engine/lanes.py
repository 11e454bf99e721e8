"""Parts of a block that need nothing of each other, side by side: where one leaves multiprocessors idle, at its
kernels' beginnings and ends, the other fills them.

Only while a CUDA graph is recorded: elsewhere the host hands kernels out one by one, and a second stream would cost it
more than the device gains. Bits do not depend on it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lane", "join_all"]


class Lane:
    """What is done `with` it goes beside what follows, until `join`.

    Memory is the allocator's of two streams, which reuse what is freed at once, each on its own. So keep what both use
    (a local name does) until the join.
    """

    def __init__(self, like: Tensor) -> None:
        record = like.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
        self._stream = _stream_of(like.device) if record else None
        self._within: Any = None

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            _open_lanes().add(self)
            self._within = torch.cuda.stream(self._stream)
            self._within.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._within is not None:
            self._within.__exit__(*error)
            self._within = None

    def join(self) -> None:
        """Let what follows wait for what was done in the lane."""
        if self._stream is not None:
            _open_lanes().discard(self)
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


def join_all() -> None:
    """Join what an exception left open: a recording cannot end before."""
    for lane in [*_open_lanes()]:
        lane.join()


_here = threading.local()  # of this thread: `lanes`, those that were entered and not joined


def _open_lanes() -> set[Lane]:
    if not hasattr(_here, "lanes"):
        _here.lanes = set()
    return _here.lanes


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
