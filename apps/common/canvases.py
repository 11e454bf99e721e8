"""Controls that take pictures: an upload, a picture to mark, a page to draw on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from apps.common.control import Control
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from gradio.components import Component

__all__ = ["brush_for", "canvas", "photo", "picture", "sketchpad"]

# Colour and strength of the strokes that mark a part of a picture.
MARKER = ("#ff2d78", 0.7)
# What a picture is painted over with, besides any colour of the visitor's choice.
PAINTS = ["#d42a2a", "#f08c1e", "#f2d024", "#2e9e3f", "#2456c9", "#7b3fb5", "#ffffff", "#8a8a8a", "#111111"]


def picture(name: str, label: str, describe: str, place: str = "picture") -> Control:
    """A picture to start from: uploaded, pasted or dropped. Its value is the path of the uploaded file."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Image(
            label=label,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=300 if place == "picture" else 180,
            placeholder="Upload, drop or paste a picture here",
            elem_id=f"nb-{name}",
        )

    return Control(name, dict | None, describe, build, lambda spec: None, place=place)


def photo(name: str, label: str, describe: str, place: str = "picture") -> Control:
    """A picture to start from that can be painted over first, in any colour.

    Its value is a canvas's, or that of a plain picture where it comes from a program.
    """

    def own(side: int) -> dict[str, Any]:
        import gradio as gr

        return {
            "brush": gr.Brush(default_size=max(3, side // 32), colors=[*PAINTS]),
            "eraser": gr.Eraser(default_size=max(4, side // 20)),
            "canvas_size": (256, 256),
            "placeholder": "Upload, drop or paste a picture here;\npaint over it, if you like",
        }

    more = f"{describe} A mapping of background and layers is taken as well: the layers are painted over it."
    return _editor(name, label, more, own, place)


def canvas(name: str, label: str, describe: str) -> Control:
    """A picture of which parts are marked, with brush and eraser. Its value maps "background" and "layers" to files."""

    def own(side: int) -> dict[str, Any]:
        import gradio as gr

        return {
            # Strokes stand out on any picture and let it be seen; a pixel counts from half of their strength on.
            "brush": gr.Brush(default_size=max(4, side // 14), colors=[MARKER], color_mode="fixed"),
            # As large as the pictures of the examples: the editor drops given layers when a picture resizes it.
            "canvas_size": (256, 256),
            "placeholder": "Upload, drop or paste a picture here,\nthen paint over what shall change",
        }

    return _editor(name, label, describe, own)


def brush_for(brush: Any, side: int, other: int) -> Any:
    """The brush to the measure of a picture whose shorter side is `other` pixels long, where it was made for `side`."""
    return dataclasses.replace(brush, default_size=max(2, round(brush.default_size * other / side)))


def sketchpad(name: str, label: str, describe: str) -> Control:
    """A white page to draw on in black, with an eraser; a picture can be laid under the strokes.

    Its value maps "background" and "layers" to files, as a canvas does.
    """

    def own(side: int) -> dict[str, Any]:
        import gradio as gr

        return {
            "brush": gr.Brush(default_size=max(2, side // 128), colors=["#000000"], color_mode="fixed"),
            "eraser": gr.Eraser(default_size=max(8, side // 16)),
            "canvas_size": (side, side),
            "fixed_canvas": True,
            "elem_classes": ["nb-editor", "nb-draw-first"],
        }

    return _editor(name, label, describe, own)


def _editor(
    name: str, label: str, describe: str, own: Callable[[int], dict[str, Any]], place: str = "picture"
) -> Control:
    """A picture editor of one layer; `own` is what sets it apart, given the side of the model's pictures in pixels."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        more: dict[str, Any] = {"elem_classes": ["nb-editor"]} | own(int(spec.size.default))
        return gr.ImageEditor(
            label=label,
            type="filepath",
            format="png",
            sources=["upload", "clipboard"],
            layers=False,
            transforms=(),
            height=370 if place == "picture" else 300,
            elem_id=f"nb-{name}",
            **more,
        )

    return Control(name, dict | None, describe, build, lambda spec: None, place=place)
