"""Lays out the page of any app: what is where. What happens is in `events`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from apps.common import api, columns, comparison, events, history, panels
from apps.common.app import App
from apps.common.columns import Column
from apps.common.comparison import Comparison
from apps.common.controls import ASPECTS, Control
from apps.common.history import History
from apps.common.mended import mend
from apps.common.studio import Studio

__all__ = ["Page", "blocks", "build", "furnish", "layout"]

HOUR = 3600


@dataclass
class Page:
    """The components of one page; `controls` by name, `columns` by precision."""

    banner: gr.HTML
    footer: gr.HTML
    generate: gr.Button
    stop: gr.Button
    message: gr.HTML
    randomise: gr.Checkbox
    preview: gr.Checkbox
    batch: gr.Slider
    last_seed: gr.Button
    recall: gr.UploadButton
    columns: dict[str, Column]
    comparison: Comparison
    history: History
    last: gr.State
    drawn: gr.State
    aspect: gr.Radio | None = None
    live: gr.Checkbox | None = None
    seen: gr.Image | None = None
    examples: list[gr.Button] = field(default_factory=list)
    controls: dict[str, gr.components.Component] = field(default_factory=dict)


def build(studio: Studio) -> gr.Blocks:
    """Build the page; styling comes with `launch`."""
    with blocks(f"{studio.app.title} · Nibble Studio") as demo:
        furnish(demo, studio)
    return demo


def blocks(title: str) -> gr.Blocks:
    """An empty page of the suite."""
    mend()
    return gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(HOUR, 24 * HOUR))


def furnish(demo: gr.Blocks, studio: Studio, endpoint: str = "generate", house: Sequence[App] = ()) -> None:
    """Put the app's page, its events and its `endpoint` into the Blocks being built; `house`: the apps beside it."""
    page = layout(studio, house)
    events.wire(demo, page, studio)
    api.add(studio, endpoint)


def layout(studio: Studio, house: Sequence[App] = ()) -> Page:
    """Lay the components out inside the Blocks being built, with no events yet."""
    controls: dict[str, gr.components.Component] = {}
    with gr.Column(elem_id="nb-page"):
        gr.HTML(panels.header(studio.app, house), elem_id="nb-header")
        banner = gr.HTML(panels.banner(studio.choice, studio.pool, studio.app), elem_id="nb-banner")
        with gr.Row(elem_id="nb-work", elem_classes=_kinds(studio.app)):
            with gr.Column(elem_id="nb-desk", elem_classes=["nb-card"], min_width=300):
                _place(studio, "model", controls)
                _place(studio, "picture", controls)
                _more(studio, controls)
                _place(studio, "prompt", controls)
                # Where a picture comes first, the page does not open at the words below it.
                controls["prompt"].autofocus = not _is_pictured(studio.app)  # pyright: ignore[reportAttributeAccessIssue]
                _place(studio, "under", controls)
                live = _live(studio)
                with gr.Row(elem_classes=["nb-go"]):
                    generate = gr.Button("Generate", variant="primary", elem_id="nb-generate", min_width=120)
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="nb-stop", min_width=80)
                message = gr.HTML("", elem_id="nb-message")
                examples = _examples(studio)
                with gr.Row(elem_classes=["nb-seed"]):
                    _place(studio, "seed", controls)
                    randomise = gr.Checkbox(True, label="New seed each time", elem_id="nb-randomise", min_width=150)
                with gr.Row(elem_classes=["nb-again"]):
                    last_seed = gr.Button(
                        "Reuse last seed", size="sm", interactive=False, elem_id="nb-last-seed", min_width=120
                    )
                    recall = gr.UploadButton(
                        "Recall from PNG", size="sm", file_types=[".png"], elem_id="nb-recall", min_width=120
                    )
                aspect, preview, batch = _options(studio, controls)
            with gr.Column(elem_id="nb-results", min_width=300):
                with gr.Row(elem_id="nb-columns", elem_classes=["nb-pair"]):
                    painted = {precision: columns.build(precision) for precision in studio.pool.precisions}
                seen = _seen(studio)
        compared = comparison.build(studio.pool.precisions)
        kept = history.build()
        gr.HTML(panels.explanation(studio.app))
        footer = gr.HTML(panels.footer(studio.choice))
    return Page(
        banner, footer, generate, stop, message, randomise, preview, batch, last_seed, recall, painted, compared, kept,
        gr.State(None), gr.State(None), aspect, live, seen, examples, controls,
    )  # fmt: skip


def _kinds(app: App) -> list[str]:
    """What the sheet has to know of an app: whether it starts from a picture, and whether it paints at each change."""
    return ["nb-pictured"] * _is_pictured(app) + ["nb-at-once"] * (app.live is not None)


def _is_pictured(app: App) -> bool:
    return any(control.place == "picture" for control in app.controls)


def _place(studio: Studio, place: str, controls: dict[str, gr.components.Component]) -> list[Control]:
    placed = [control for control in studio.controls if control.place == place]
    for control in placed:
        part = controls[control.name] = control.build(studio.spec_for(control))
        part.visible = control.applies(studio.choice.spec)
    return placed


def _more(studio: Studio, controls: dict[str, gr.components.Component]) -> None:
    """Further pictures, folded away; nothing where the app takes one."""
    if any(control.place == "more" for control in studio.controls):
        with gr.Accordion("Mix with other pictures", open=False, elem_id="nb-more"):
            _place(studio, "more", controls)


def _live(studio: Studio) -> gr.Checkbox | None:
    """The switch of painting at every change, where the app can."""
    if studio.app.live is None:
        return None
    return gr.Checkbox(True, label="Paint anew after each stroke", elem_id="nb-live")


def _seen(studio: Studio) -> gr.Image | None:
    """Where the page shows what the model really sees, below the results; hidden until there is a picture."""
    if studio.app.seen is None:
        return None
    name, words = studio.app.seen
    with gr.Row(elem_id="nb-seen-card", elem_classes=["nb-card"]):
        gr.HTML(panels.seen(words), elem_id="nb-seen-words")
        return gr.Image(
            label=words, show_label=False, interactive=False, buttons=["download", "fullscreen"],
            elem_id="nb-seen", elem_classes=["nb-picture"], alt_text=f"{words} ({name})",
        )  # fmt: skip


def _options(
    studio: Studio, controls: dict[str, gr.components.Component]
) -> tuple[gr.Radio | None, gr.Checkbox, gr.Slider]:
    """The folded settings; returns the choice of a shape (where there is one), the switch of previews, the seeds."""
    aspect = None
    with gr.Accordion("Options", open=False, elem_id="nb-options"):
        _place(studio, "options", controls)
        if any(control.place == "size" for control in studio.controls):
            aspect = gr.Radio(list(ASPECTS), value="1:1", label="Shape", elem_id="nb-aspect")
            _place(studio, "size", controls)
        batch = gr.Slider(
            1, 8, 1, step=1, label="Pictures", info="One after the other, from seeds in a row", elem_id="nb-batch",
            visible=studio.app.live is None,
        )  # fmt: skip
        preview = gr.Checkbox(
            True, label="Preview while painting", info="Its time is not counted", elem_id="nb-live-preview",
            visible=studio.previews,
        )  # fmt: skip
    return aspect, preview, batch


def _examples(studio: Studio) -> list[gr.Button]:
    examples = studio.app.examples_for(studio.choice.spec)
    if not examples:
        return []
    with gr.Column(elem_id="nb-examples"):
        gr.HTML("<p>Try one of these</p>")
        return [
            gr.Button(title, size="sm", icon=_icon(example), elem_classes=["nb-example"])
            for title, example in zip(studio.app.titles_for(studio.choice.spec), examples, strict=True)
        ]


def _icon(example: Mapping[str, Any]) -> str | None:
    """The picture an example starts from.

    It is served from where it lies: a copy in Gradio's cache would be deleted by the first server that is closed, of
    all those on the machine that show it.
    """
    for value in example.values():
        value = value.get("composite") if isinstance(value, Mapping) else value
        if isinstance(value, Path):
            gr.set_static_paths([value])
            return str(value)
    return None
