"""Several apps in one process: a page that shows them all, a page each, one queue and one device."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

import gradio as gr

from apps.common import panels, shell
from apps.common.app import App
from apps.common.studio import Studio

__all__ = ["build", "gallery"]

CARDS = Path(__file__).with_name("assets") / "cards"


def build(studios: Sequence[Studio]) -> gr.Blocks:
    """Build the house: "/" shows all apps, "/SLUG" is an app, and its endpoint is named by its slug too."""
    apps = [studio.app for studio in studios]
    with shell.blocks("Nibble Studio") as demo:
        gr.Navbar(visible=False)
        with gr.Column(elem_id="nb-page"):
            gr.HTML(gallery(apps))
            gr.HTML(panels.house_footer())
    for studio in studios:
        with demo.route(studio.app.title, f"/{studio.app.slug}", show_in_navbar=False):
            gr.Navbar(visible=False)
            shell.furnish(demo, studio, studio.app.slug, apps)
    return demo


def gallery(apps: Sequence[App]) -> str:
    """The first page: what this is, and a card for each app."""
    cards = "".join(
        f'<a class="nb-door nb-card" href="{app.slug}">{_picture(app.slug)}<span class="nb-door-head">'
        f"{panels.sign(app.nibble, 26)}<b>{escape(app.title)}</b></span><span>{escape(app.summary)}</span></a>"
        for app in apps
    )
    return (
        f'<header class="nb-header"><div class="nb-brand">{panels.sign(0b1111, 40)}<div><p>Nibble Studio</p>'
        "<h1>Paint in four bits</h1></div></div>"
        '<p class="nb-summary">Each app paints a picture twice from the same noise, in 16 bits and in 4, side by side. '
        f"Choose one.</p>{panels.light_switch()}</header>"
        f'<div class="nb-doors">{cards}</div>'
    )


@cache
def _picture(slug: str) -> str:
    """What went in and what came out, or what both precisions made; drawn by `python -m apps.common.cards`."""
    file = CARDS / f"{slug}.webp"
    if not file.is_file():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img src="data:image/webp;base64,{data}" width="512" height="256" alt="">'
