"""Which device a name stands for."""

from __future__ import annotations

import torch

from engine.errors import ArgumentError

__all__ = ["pick_device"]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """Turn "auto" into CUDA where a GPU answers, else the CPU; check any other name.

    Raises ArgumentError when the device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device: expected auto, cpu or cuda[:index], got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device: expected auto, cpu or cuda[:index], got {str(device)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device: {device} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen
