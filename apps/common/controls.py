"""Controls carry their name; whatever reads or fills them goes by that name, never by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from apps.common import styles
from apps.common.canvases import canvas, photo, picture, sketchpad
from apps.common.control import Control, always, between, slider
from apps.common.sizes import ASPECTS, aspect_size, fitting_size, size
from engine.errors import RequestError
from engine.models.catalogue import ModelSpec
from engine.request import MAX_PROMPT_CHARACTERS, MAX_SEED

if TYPE_CHECKING:
    from gradio.components import Component

__all__ = [
    "ASPECTS",
    "Control",
    "aspect_size",
    "canvas",
    "check",
    "check_number",
    "choice",
    "decimal",
    "fitting_size",
    "guidance",
    "model",
    "number",
    "photo",
    "picture",
    "prompt",
    "seed",
    "size",
    "sketchpad",
    "steps",
    "style",
]

# gradio takes seconds to import, so each `build` imports it: a command that only prints its help does not wait.


def prompt(placeholder: str = "", needed: bool = True) -> Control:
    """What to paint: several lines, Ctrl+Enter runs. Where a picture says enough it is not `needed`."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Textbox(
            label="Prompt" if needed else "Prompt (optional)",
            placeholder=placeholder,
            lines=2,
            max_lines=6,
            autofocus=True,
            elem_id="nb-prompt",
        )

    return Control(
        name="prompt",
        kind=str,
        describe=f"What to paint, at most {MAX_PROMPT_CHARACTERS} characters.",
        default=lambda spec: "",
        place="prompt",
        build=build,
    )


def choice(name: str, label: str, options: tuple[str, ...], info: str, place: str = "options") -> Control:
    """One of a few words, the first unless another is chosen: side by side where there are two, else in a list."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        kind = gr.Radio if len(options) == 2 else gr.Dropdown
        return kind(list(options), value=options[0], label=label, info=info, elem_id=f"nb-{name}")

    return Control(
        name, Literal[options], info, build, lambda spec: options[0], place=place,
        recalls=lambda value, spec: value in options,
    )  # fmt: skip


def number(
    name: str, label: str, limits: tuple[int, int, int], info: str, applies: Callable[[ModelSpec], bool] = always
) -> Control:
    """A whole number on a slider; `limits` are the lowest, the highest and the default."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Slider(limits[0], limits[1], limits[2], step=1, label=label, info=info, elem_id=f"nb-{name}")

    described = f"{info}, {limits[0]} to {limits[1]}."
    return Control(
        name, int, described, build, lambda spec: limits[2], applies=applies, recalls=between(limits[0], limits[1])
    )


def decimal(
    name: str,
    label: str,
    limits: tuple[float, float, float | Callable[[ModelSpec], float]],
    info: str,
    *,
    step: float = 0.1,
    place: str = "options",
) -> Control:
    """A number on a slider; `limits` are the lowest, the highest and the default, which may depend on the model."""
    low, high, usual = limits

    def default(spec: ModelSpec) -> float:
        return usual(spec) if callable(usual) else usual

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Slider(low, high, default(spec), step=step, label=label, info=info, elem_id=f"nb-{name}")

    return Control(
        name, float, f"{info}. {low:g} to {high:g}.", build, default, place=place,
        recalls=between(low, high), ranged=callable(usual),
    )  # fmt: skip


def check_number(name: str, value: Any, limits: tuple[float, float]) -> float:
    """`value` as it is within `limits`; raises RequestError naming the control otherwise."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and limits[0] <= value <= limits[1]
    if not ok:
        raise RequestError(name, f"{name}: expected a number from {limits[0]:g} to {limits[1]:g}, got {value!r}")
    return float(value)


def check(name: str, label: str, info: str) -> Control:
    """A yes or no, off by default."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Checkbox(False, label=label, info=info, elem_id=f"nb-{name}")

    return Control(name, bool, info, build, lambda spec: False, recalls=lambda value, spec: isinstance(value, bool))


def model(specs: Sequence[ModelSpec]) -> Control:
    """Which of several models paints; the first unless another is chosen."""
    names = tuple(spec.name for spec in specs)

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Radio([(each.title, each.name) for each in specs], value=names[0], label="Model", elem_id="nb-model")

    return Control(
        name="model",
        kind=Literal[names],
        describe=f"Which model paints: {', '.join(names)}.",
        default=lambda spec: names[0],
        place="model",
        build=build,
    )


def seed() -> Control:
    """Seed of the noise that every precision starts from."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Number(label="Seed", value=7, precision=0, elem_id="nb-seed", min_width=150)

    return Control(
        name="seed",
        kind=int,
        describe=f"Seed of the noise, 0 to {MAX_SEED}; the same seed gives the same picture.",
        default=lambda spec: 7,
        place="seed",
        build=build,
    )


def steps() -> Control:
    """Denoising steps, within the model's limits."""
    return Control(
        name="steps",
        kind=int | None,
        describe="Denoising steps; left out, the model's own number.",
        default=lambda spec: None,
        applies=lambda spec: spec.steps.high > spec.steps.low,
        build=lambda spec: slider("steps", spec.steps, "More steps: more detail, more time"),
        ranged=True,
    )


def guidance() -> Control:
    """How closely the picture follows the prompt; absent where the model has no such setting."""
    return Control(
        name="guidance",
        kind=float | None,
        describe="How closely to follow the prompt; left out, the model's own value.",
        default=lambda spec: None,
        applies=lambda spec: spec.guidance is not None,
        build=lambda spec: slider("guidance", spec.guidance, "How closely to follow the prompt"),
        ranged=True,
    )


def style() -> tuple[Control, Control]:
    """One of the ten styles, and its words, to be changed at will."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Dropdown(
            list(styles.STYLES),
            value=styles.NONE,
            label="Style",
            info="Words put around your prompt",
            elem_id="nb-style",
        )

    def build_words(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Textbox(
            label="Words of the style",
            info=f"{styles.MARK} stands for your prompt; change the rest as you like",
            lines=2,
            max_lines=4,
            max_length=styles.MAX_WORDS,
            elem_id="nb-style_words",
        )

    named = Control(
        name="style",
        kind=Literal[tuple(styles.STYLES)],
        describe="Words put around the prompt before it is checked and painted.",
        default=lambda spec: styles.NONE,
        build=build,
    )
    words = Control(
        name="style_words",
        kind=str,
        describe=f"Words of your own instead of the style's, with {styles.MARK} where the prompt belongs.",
        default=lambda spec: "",
        build=build_words,
    )
    return named, words
