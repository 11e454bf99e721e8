"""From an exception to the one sentence a person reads."""

from __future__ import annotations

from engine import EngineError

__all__ = ["sentence"]


def sentence(error: BaseException) -> str:
    """Say in one sentence what went wrong; errors raised on purpose already carry theirs."""
    if isinstance(error, EngineError):
        return str(error)
    # torch's own class, named here so that telling of an error never has to import torch.
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "The device ran out of memory; choose a smaller size, or start with one precision."
    text = " ".join(str(error).split())
    return f"The engine failed: {type(error).__name__}{': ' + text if text else ''}."
