"""Every error this package raises on purpose.

    EngineError
    ├── ArgumentError       a value given to an op or a function is wrong        (also ValueError)
    │   └── RequestError    a field of a Request is wrong                        (also ValueError)
    ├── BackendError        no backend can run what was asked, or a kernel failed (also RuntimeError)
    ├── CheckpointError     a weights file is missing, damaged or of the wrong model
    ├── ModelError          a model cannot be found, downloaded or opened
    └── Cancelled           the caller asked a run to stop

A message names the argument, what was expected and what came, and says what to do next where there is something to do.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BackendError",
    "Cancelled",
    "CheckpointError",
    "EngineError",
    "ModelError",
    "RequestError",
]


_LONGEST = 1200


class EngineError(Exception):
    """Base of every error raised on purpose by this package."""


class ArgumentError(EngineError, ValueError):
    """A value given to an op or a function is wrong."""


class RequestError(ArgumentError):
    """A field of a Request is wrong; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class BackendError(EngineError, RuntimeError):
    """No backend can run what was asked, or a compiled kernel reported a failure."""


class CheckpointError(EngineError):
    """A weights file is missing, damaged, or made for another model.

    The message quotes names that the file chose, so it is cut to one line of a length that can be shown.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ...")


class ModelError(EngineError):
    """A model cannot be found, downloaded or opened."""


class Cancelled(EngineError):
    """The caller asked a run to stop before it finished."""
