"""Width and height: the controls, the shapes to choose from, and what fits a model."""

from __future__ import annotations

from apps.common.control import Control, slider
from engine.models.catalogue import ModelSpec

__all__ = ["ASPECTS", "aspect_size", "fitting_size", "size"]

ASPECTS: dict[str, tuple[int, int]] = {
    "1:1": (1, 1),
    "4:3": (4, 3),
    "3:4": (3, 4),
    "3:2": (3, 2),
    "2:3": (2, 3),
    "16:9": (16, 9),
    "9:16": (9, 16),
}


def size() -> tuple[Control, Control]:
    """Width and height in pixels, within the model's limits."""
    return _side("width"), _side("height")


def _side(name: str) -> Control:
    return Control(
        name=name,
        kind=int | None,
        describe=f"{name.capitalize()} in pixels; left out, the model's own.",
        default=lambda spec: None,
        place="size",
        build=lambda spec: slider(name, spec.size, f"Pixels, a multiple of {spec.size.step:g}"),
        ranged=True,
    )


def aspect_size(spec: ModelSpec, aspect: str) -> tuple[int, int]:
    """Width and height of about the model's own pixel count in that aspect, on its step and within its limits."""
    return fitting_size(spec, *ASPECTS[aspect])


def fitting_size(spec: ModelSpec, across: int, down: int) -> tuple[int, int]:
    """Width and height of about the model's own pixel count, of the shape of a picture `across` by `down`."""
    ratio = (across / down) ** 0.5
    return _snap(spec, spec.size.default * ratio), _snap(spec, spec.size.default / ratio)


def _snap(spec: ModelSpec, pixels: float) -> int:
    step = spec.size.step
    return int(min(max(round(pixels / step) * step, spec.size.low), spec.size.high))
