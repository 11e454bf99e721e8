"""What happens on the page: every handler, wired by component and matched by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from apps.common import canvases, comparison, controls, history, painting, panels, pictures, recalling, styles
from apps.common.comparison import Shot
from apps.common.painting import PRIVATE
from apps.common.studio import Studio
from apps.common.uploads import open_picture
from engine import RequestError

if TYPE_CHECKING:
    from apps.common.shell import Page

__all__ = ["wire"]

# How often a page is told that its model is ready: answers may overtake each other, and the last one must be right.
_TOLD = 4


def wire(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    """Connect every component of the page."""
    live = painting.wire(page, studio)
    _wire_loading(demo, page, studio)
    _wire_settings(page, studio, live)
    _wire_comparison(page, studio)
    _wire_history(page, studio)
    _wire_reuse(page, studio)

    def leave(request: gr.Request) -> None:
        studio.desk.close(painting.session(request))

    demo.unload(leave)


def _wire_loading(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    clock, settled = gr.Timer(0.7, active=True), gr.State(0)
    switch = page.controls.get("model")

    def look(times: int, model: str | None = None) -> tuple[Any, Any, int]:
        room = studio.room({"model": model})
        room.pool.start()
        times = times + 1 if room.pool.settled else 0
        return panels.banner(room.choice, room.pool, studio.app), gr.Timer(active=times < _TOLD), times

    inputs = [settled, switch] if switch else [settled]
    for event in (demo.load, clock.tick):
        event(look, inputs=inputs, outputs=[page.banner, clock, settled], queue=False, **PRIVATE)
    if switch is not None:
        _wire_switch(page, studio, switch, [page.banner, clock, settled, page.footer], look)


def _wire_switch(page: Page, studio: Studio, switch: Any, told: list[Any], look: Callable[..., Any]) -> None:
    """Another model: its engines are loaded, and controls take its limits and defaults."""

    def tell(model: str) -> tuple[Any, ...]:
        return *look(0, model), panels.footer(studio.room({"model": model}).choice)

    switch.change(tell, inputs=[switch], outputs=told, queue=False, **PRIVATE)
    changed = [page.controls[control.name] for control in studio.controls if _depends(control, studio)]
    switch.input(
        lambda model: _ranges(page, studio, {"model": model}), inputs=[switch], outputs=changed, queue=False, **PRIVATE
    )


def _depends(control: controls.Control, studio: Studio) -> bool:
    """Whether a control is not the same for all of the page's models."""
    return control.ranged or not all(control.applies(room.spec) for room in studio.rooms.values())


def _ranges(page: Page, studio: Studio, values: Mapping[str, Any]) -> dict:
    """The controls that depend on the model, as `values` want them and within the limits of the model they name."""
    spec, changed = studio.room(values).spec, {}
    for control in studio.controls:
        if not _depends(control, studio):
            continue
        anew: dict[str, Any] = {"visible": control.applies(spec)}
        if anew["visible"]:
            anew |= control.build(spec).constructor_args
            anew["value"] = values.get(control.name, anew.get("value"))
        changed[page.controls[control.name]] = gr.update(**anew)
    return changed


def _wire_settings(page: Page, studio: Studio, live: Callable[..., Any] | None) -> None:
    spec, parts = studio.choice.spec, page.controls
    for button, example in zip(page.examples, studio.app.examples_for(spec), strict=True):
        chosen = {parts[name]: value for name, value in example.items() if name in parts}
        loaded = button.click(lambda chosen=chosen: _loaded(chosen), outputs=list(chosen), queue=False, **PRIVATE)
        if live is not None:
            live(loaded.then)
    parts["style"].input(  # pyright: ignore[reportAttributeAccessIssue]
        styles.template, inputs=[parts["style"]], outputs=[parts["style_words"]], queue=False, **PRIVATE
    )
    page.last_seed.click(
        lambda seed: (seed, False), inputs=[page.last], outputs=[parts["seed"], page.randomise], queue=False, **PRIVATE
    )
    # A seed typed by hand is meant to be used; in the browser itself, for the next click may follow at once.
    parts["seed"].input(None, outputs=[page.randomise], js="() => false", **PRIVATE)  # pyright: ignore
    if page.aspect is not None:
        sides = [parts["width"], parts["height"]]
        page.aspect.input(
            lambda aspect: controls.aspect_size(spec, aspect),
            inputs=[page.aspect],
            outputs=sides,
            queue=False,
            **PRIVATE,
        )
        for side in sides:
            side.input(None, outputs=[page.aspect], js="() => null", **PRIVATE)  # pyright: ignore

    for control in studio.controls:
        _wire_upload(page, studio, control)

    def recall(path: str) -> dict:
        try:
            settings = pictures.recall(path)
        except pictures.NotOurs as error:
            return {page.message: panels.message(str(error))}
        values, note = recalling.fit(settings, studio)
        return _filled(page, studio, values) | {page.message: panels.message(note, "note")}

    page.recall.upload(recall, inputs=[page.recall], outputs=_fillable(page), queue=False, **PRIVATE)


def _loaded(value: Any) -> Any:
    """An example's value; paths to pictures become the pictures, wherever the project lies."""
    if isinstance(value, Mapping):
        return {name: _loaded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_loaded(part) for part in value]
    if not isinstance(value, Path):
        return value
    with Image.open(value) as picture:
        return picture.copy()


def _wire_upload(page: Page, studio: Studio, control: controls.Control) -> None:
    """An uploaded picture brings a brush to its measure; the one to start from also its shape.

    One listener does both: each makes the editor send its picture, which would tell the other of an upload again.
    """
    part, spec = page.controls[control.name], studio.choice.spec
    if not isinstance(part, gr.ImageEditor) or part.fixed_canvas:
        return
    shaped = [page.controls["width"], page.controls["height"], page.aspect] if control.place == "picture" else []

    def measured(given: Any) -> Any:
        try:
            picture = open_picture(given, control.name)
        except RequestError:
            return {part: gr.skip()}
        brush = canvases.brush_for(part.brush, int(spec.size.default), min(picture.size))
        shape = (*controls.fitting_size(spec, *picture.size), None)
        return {part: gr.update(brush=brush)} | dict(zip(shaped, shape, strict=False))

    part.upload(measured, inputs=[part], outputs=[part, *shaped], queue=False, **PRIVATE)


def _filled(page: Page, studio: Studio, values: dict[str, Any]) -> dict:
    filled: dict = {page.controls[name]: value for name, value in values.items() if name in page.controls}
    if values.get("model") in studio.rooms and len(studio.rooms) > 1:
        filled |= _ranges(page, studio, values)
    if page.aspect is not None and "width" in values:
        filled[page.aspect] = None
    return filled | {page.randomise: False}


def _fillable(page: Page) -> list:
    return [page.message, page.randomise, *page.controls.values(), *([page.aspect] if page.aspect else [])]


def _wire_comparison(page: Page, studio: Studio) -> None:
    parts = page.comparison

    def redraw(shots: dict[str, Shot], other: str, amplify: float) -> dict:
        drawn = comparison.shown(parts, shots, other, amplify, studio.pictures)
        return drawn | comparison.scored(parts, shots, other)

    def remap(shots: dict[str, Shot], other: str, amplify: float) -> tuple[Any, str]:
        if len(shots) < 2:
            return gr.skip(), comparison.legend(amplify)
        drawn = comparison.shown(parts, shots, other, amplify, studio.pictures)
        return drawn[parts.map], drawn[parts.legend]

    state: Any = [parts.shots, parts.other, parts.amplify]
    shown = [parts.verdict, parts.scores, parts.slider, parts.map, parts.legend]
    parts.other.input(redraw, inputs=state, outputs=shown, queue=False, **PRIVATE)
    parts.amplify.release(remap, inputs=state, outputs=[parts.map, parts.legend], queue=False, **PRIVATE)


def _wire_history(page: Page, studio: Studio) -> None:
    kept = page.history

    def select(event: gr.SelectData) -> tuple[Any, Any]:
        return event.index, gr.update(interactive=True)

    def reuse(entries: list[history.Entry], index: int | None) -> dict:
        if index is None or not 0 <= index < len(entries):
            return {page.message: panels.message("Choose a picture of this session first.", "note")}
        return _filled(page, studio, dict(entries[index].values)) | {page.message: ""}

    def clear() -> tuple[Any, ...]:
        return [], [], None, gr.update(interactive=False)

    kept.gallery.select(select, outputs=[kept.selected, kept.reuse], queue=False, **PRIVATE)
    state: Any = [kept.entries, kept.selected]
    kept.reuse.click(reuse, inputs=state, outputs=_fillable(page), queue=False, **PRIVATE)
    emptied = [kept.entries, kept.gallery, kept.selected, kept.reuse]
    kept.clear.click(clear, outputs=emptied, queue=False, **PRIVATE)


def _wire_reuse(page: Page, studio: Studio) -> None:
    """A result becomes what the next run starts from."""
    if studio.app.reuse is None:
        return
    target = page.controls[studio.app.reuse]

    def take(path: str | None) -> Any:
        if path is None:
            return gr.skip()
        return {"background": path, "layers": [], "composite": path} if isinstance(target, gr.ImageEditor) else path

    for column in page.columns.values():
        column.reuse.click(take, inputs=[column.image], outputs=[target], queue=False, **PRIVATE)
