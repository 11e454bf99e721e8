"""How much a PEFT adapter counts where its file holds no `.alpha`: lora_alpha, alpha_pattern and the like.

diffusers writes the adapter's configuration into the file's metadata (`lora_adapter_metadata`), PEFT itself into an
`adapter_config.json` beside it; loading the file with either multiplies the factors by alpha / r.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

__all__ = ["Scaling", "read_scaling"]

_KEY = "lora_adapter_metadata"
_CONFIG = "adapter_config.json"
_PREFIX = "transformer."


class Scaling:
    """Scale of each module's factors, from an adapter's configuration (PEFT's LoraConfig as a dict)."""

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        self._alpha = _number("lora_alpha", config.get("lora_alpha"))
        patterns = config.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"alpha_pattern: expected a JSON object, got {patterns!r}")
        self._patterns = {str(key): _number(f"alpha_pattern.{key}", value) for key, value in patterns.items()}
        self._root = bool(config.get("use_rslora"))

    def of(self, module: str, rank: int) -> float:
        """alpha / rank (or / sqrt(rank) for a rank-stabilized one); 1 where nothing is told of `module`."""
        alpha = next((value for key, value in self._patterns.items() if _matches(key, module)), self._alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self._root else rank)


def read_scaling(path: Path, metadata: Mapping[str, str]) -> Scaling:
    """The scaling that belongs to a LoRA file; raises CheckpointError when it is not readable."""
    beside = (path if path.is_dir() else path.parent) / _CONFIG
    try:
        if _KEY in metadata:
            return Scaling(_own(json.loads(metadata[_KEY])))
        if beside.is_file() and (path.is_dir() or path.name.startswith("adapter_model")):
            return Scaling(_own(json.loads(beside.read_text(encoding="utf-8"))))
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"its adapter configuration is damaged ({error})") from error
    return Scaling()


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the transformer: a pipeline's file names the part before each key."""
    named = {key.removeprefix(_PREFIX): value for key, value in config.items() if key.startswith(_PREFIX)}
    return named or dict(config)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{name}: expected a number, got {value!r}")
    return float(value)


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern is for a module, as PEFT decides: a regular expression for the end of its path."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise CheckpointError(f"alpha_pattern: {pattern!r} is no regular expression ({error})") from error
