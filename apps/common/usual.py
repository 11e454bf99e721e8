"""The settings of every app that denoises in several steps, in the order in which the page shows them."""

from __future__ import annotations

from apps.common import controls, loras
from apps.common.control import Control

__all__ = ["options"]


def options() -> tuple[Control, ...]:
    """Steps, guidance, style, LoRA and size."""
    return controls.steps(), controls.guidance(), *controls.style(), *loras.choose(), *controls.size()
