"""A control: what it is called, what it takes, and the component that asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.models.catalogue import ModelSpec, Range

if TYPE_CHECKING:
    from gradio.components import Component

__all__ = ["Control", "always", "between", "never", "slider"]


def always(spec: ModelSpec) -> bool:
    """Every model has the setting."""
    return True


def never(value: Any, spec: ModelSpec) -> bool:
    """No value is taken out of a picture's file."""
    return False


def between(low: float, high: float) -> Callable[[Any, ModelSpec], bool]:
    """A number within the limits is taken."""
    return lambda value, spec: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Control:
    """One value a user sets.

    `kind` is its type in the programming interface and `describe` its sentence there. `build` makes the component for
    a model; `default` is its value when nobody sets it; `applies` says whether the model has such a setting at all.
    `recalls` says of a setting that only this app has whether a value out of a picture's file can be taken.
    `ranged` says that its limits or default depend on the model.
    `place` is where the page puts it: "model" (at the top), "picture", "more" (further pictures, folded), "prompt",
    "under" (right under the prompt), "seed", "size" or "options".
    """

    name: str
    kind: Any
    describe: str
    build: Callable[[ModelSpec], Component]
    default: Callable[[ModelSpec], Any]
    place: str = "options"
    applies: Callable[[ModelSpec], bool] = always
    recalls: Callable[[Any, ModelSpec], bool] = never
    ranged: bool = False


def slider(name: str, limits: Range | None, info: str) -> Component:
    """A slider over a range of the model's, whole where the range is; ValueError where the model has none."""
    import gradio as gr

    if limits is None:
        raise ValueError(f"{name}: the model has no such setting")
    low, high, default, step = (
        int(number) if float(number).is_integer() else number
        for number in (limits.low, limits.high, limits.default, limits.step)
    )
    return gr.Slider(low, high, default, step=step, label=name.capitalize(), info=info, elem_id=f"nb-{name}")
