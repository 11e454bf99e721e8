"""LoRAs on 4-bit models: read any common format, compose, and apply through the low-rank branch.

from engine.lora import load_lora, set_lora_strength, unload_lora

load_lora(engine, "style.safetensors", strength=0.8, name="style")
set_lora_strength(engine, "style", 0.4)
unload_lora(engine, "style")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.lora.combine import compose
    from engine.lora.detect import detect_format
    from engine.lora.runtime import (
        LoadedLora,
        list_loras,
        load_lora,
        load_loras,
        set_lora_strength,
        set_lora_strengths,
        unload_lora,
    )
    from engine.lora.weights import LoraWeights, read_lora

_HOMES = {
    "LoadedLora": "runtime",
    "LoraWeights": "weights",
    "compose": "combine",
    "detect_format": "detect",
    "list_loras": "runtime",
    "load_lora": "runtime",
    "load_loras": "runtime",
    "read_lora": "weights",
    "set_lora_strength": "runtime",
    "set_lora_strengths": "runtime",
    "unload_lora": "runtime",
}

__all__ = [
    "LoadedLora",
    "LoraWeights",
    "compose",
    "detect_format",
    "list_loras",
    "load_lora",
    "load_loras",
    "read_lora",
    "set_lora_strength",
    "set_lora_strengths",
    "unload_lora",
]


def __getattr__(name: str) -> Any:
    # torch loads when a LoRA is first touched, not when the package is imported.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"engine.lora.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
