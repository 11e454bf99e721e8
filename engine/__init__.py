"""4-bit diffusion: SVDQuant linears, compiled kernels, and the models that use them.

    from engine import Engine, Request

    engine = Engine.load("tiny", "int4")
    result = engine.run(Request("a large red metal sphere left of a small blue cube", seed=7))
    result.save("sphere.png")

Importing this package touches no GPU; torch and diffusers load when an Engine is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine.errors import (
    ArgumentError,
    BackendError,
    Cancelled,
    CheckpointError,
    EngineError,
    ModelError,
    RequestError,
)
from engine.request import Request, Result, Step, read_metadata

if TYPE_CHECKING:
    from engine.checkpoint.pretrained import SVDQuantFluxTransformer, SVDQuantSanaTransformer, SVDQuantT5Encoder
    from engine.generate import Engine

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "Cancelled",
    "CheckpointError",
    "Engine",
    "EngineError",
    "ModelError",
    "Request",
    "RequestError",
    "Result",
    "SVDQuantFluxTransformer",
    "SVDQuantSanaTransformer",
    "SVDQuantT5Encoder",
    "Step",
    "__version__",
    "read_metadata",
]


def __getattr__(name: str) -> Any:
    # Engine pulls in torch; a command that only prints its help should not wait for that.
    if name == "Engine":
        from engine.generate import Engine

        return Engine
    if name in ("SVDQuantFluxTransformer", "SVDQuantSanaTransformer", "SVDQuantT5Encoder"):
        from engine.checkpoint import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
