"""How many bytes a model holds and how many a run needs at its highest point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["PeakMeter", "module_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; tensors that share storage count once.

    Weights that other libraries quantized, and hold in parts (torchao) or with scales beside them (bitsandbytes),
    count in full.
    """
    storages: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _parts(tensor: Any) -> list[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
    state = getattr(tensor, "quant_state", None)
    states = [held for held in (state, getattr(state, "state2", None)) if held is not None]
    return [tensor, *(held.absmax for held in states)]


class PeakMeter:
    """Measures the bytes one run needs: `with PeakMeter(device, held) as meter: ...; meter.bytes`.

    On CUDA this is the allocator's peak. On a CPU it is `held` (the weights in use, in bytes) plus the growth of the
    process's resident memory above its value at the start; Linux lets a process reset that peak. Where the system
    does not tell, `bytes` is `held` alone, a lower bound.
    """

    def __init__(self, device: torch.device, held: int) -> None:
        self.device = device
        self.held = held
        self.bytes = held

    def __enter__(self) -> PeakMeter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._start = _reset_resident_peak()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._start is not None:
            peak = _status_bytes("VmHWM") or self._start
            self.bytes = self.held + max(0, peak - self._start)


def _reset_resident_peak() -> int | None:
    """Set the resident peak to the present value and return it; None where the system does not allow that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None
