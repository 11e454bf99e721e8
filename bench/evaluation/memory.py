"""How much memory one call needs beside other models that stay loaded."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from engine.memory import PeakMeter, module_bytes

__all__ = ["peak_of"]


def peak_of(call: Callable[[], Any], device: torch.device, modules: Sequence[nn.Module]) -> int:
    """Bytes of `modules` and what one call adds at its highest point, whatever else the process holds.

    On a GPU the growth is the allocator's, on a CPU that of resident memory where the system tells it.
    """
    held = sum(module_bytes(module) for module in modules)
    if device.type != "cuda":
        _give_back()
        with PeakMeter(device, held) as meter:
            call()
        return meter.bytes
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return held + torch.cuda.max_memory_allocated(device) - before


def _give_back() -> None:
    """Return freed memory to the system: what earlier runs left lying about would hide what this one needs."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
