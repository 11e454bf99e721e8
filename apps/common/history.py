"""What this session painted: bounded, downloadable, and good for another run with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from engine import Result

__all__ = ["LIMIT", "Entry", "History", "add", "build", "items"]

LIMIT = 24


@dataclass(frozen=True)
class Entry:
    """One picture: its file, the control values that made it, and the words under it."""

    path: str
    caption: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """The components; `entries` and `selected` are session state."""

    gallery: gr.Gallery
    reuse: gr.Button
    clear: gr.Button
    entries: gr.State
    selected: gr.State


def build() -> History:
    """Lay out the history; the style sheet hides it as long as there is no picture."""
    with gr.Column(elem_id="nb-history", elem_classes=["nb-section"]):
        gr.HTML(
            '<div class="nb-section-head"><h2>This session</h2>'
            f"<p>The last {LIMIT} pictures. Each PNG carries its settings; “Recall from PNG” reads them back.</p></div>"
        )
        gallery = gr.Gallery(
            show_label=False,
            columns=6,
            fit_columns=False,
            height="auto",
            object_fit="cover",
            format="png",
            buttons=["download", "download_all", "fullscreen"],
            interactive=False,
            elem_id="nb-gallery",
        )
        with gr.Row(elem_classes=["nb-tools"]):
            reuse = gr.Button("Reuse these settings", size="sm", interactive=False, elem_id="nb-reuse")
            clear = gr.Button("Clear", size="sm", elem_id="nb-clear")
    return History(gallery, reuse, clear, gr.State([]), gr.State(None))


def add(entries: list[Entry], path: str, result: Result, values: Mapping[str, Any]) -> list[Entry]:
    """The entries with this picture in front, at most LIMIT of them."""
    words = str(values.get("prompt", "")).strip()
    short = words if len(words) <= 60 else words[:59] + "…"
    caption = " · ".join([result.precision.upper(), f"seed {result.seed}", *([short] if short else [])])
    return [Entry(path, caption, dict(values)), *entries][:LIMIT]


def items(entries: list[Entry]) -> list[tuple[str, str]]:
    """The gallery's value."""
    return [(entry.path, entry.caption) for entry in entries]
