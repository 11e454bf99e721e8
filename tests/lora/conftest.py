"""LoRA test data."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
LORA = DATA / "lora"
FLUX = DATA / "flux_tiny_int4.safetensors"
