"""One column a precision: its picture, its live status, and what the run cost."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from apps.common import words
from apps.common.models import parted
from engine import Result, Step

__all__ = ["HIDDEN", "REFERENCE", "Column", "build", "canvas", "figures", "status", "step_status"]

REFERENCE = "bf16"
# Not shown, but in the page: what is not in it is loaded first when it is to be shown, and a change that comes
# meanwhile gets lost.
HIDDEN: Any = "hidden"


@dataclass(frozen=True)
class Column:
    """The components of one precision."""

    precision: str
    status: gr.HTML
    canvas: gr.HTML
    image: gr.Image
    reuse: gr.Button
    figures: gr.HTML


def build(precision: str) -> Column:
    """Lay out a column inside the current row."""
    with gr.Column(elem_classes=["nb-card", "nb-column", f"nb-{parted(precision)[0]}"], min_width=300):
        line = gr.HTML(status(precision, "idle", "Nothing painted yet"), elem_id=f"nb-status-{precision}")
        blank = gr.HTML(canvas(0), elem_id=f"nb-canvas-{precision}")
        image = gr.Image(
            visible=HIDDEN,
            type="filepath",
            format="png",
            show_label=False,
            label=f"{precision.upper()} picture",
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id=f"nb-image-{precision}",
            elem_classes=["nb-picture"],
            alt_text=f"The picture painted in {precision.upper()}",
        )
        # Shown beside a picture, in the apps that can start from one.
        again = gr.Button("Start from this picture", size="sm", visible=HIDDEN, elem_id=f"nb-reuse-{precision}")
        cost = gr.HTML(figures(None), elem_id=f"nb-figures-{precision}")
    return Column(precision, line, blank, image, again, cost)


def canvas(done: float, width: int = 1, height: int = 1, preview: Image.Image | None = None) -> str:
    """What stands where the picture of that shape will be: a preview, or nibbles lit as far as the run has come."""
    if preview is not None:
        held = io.BytesIO()
        preview.save(held, "PNG")
        data = base64.b64encode(held.getvalue()).decode()
        return (
            f'<div class="nb-canvas nb-preview" aria-hidden="true" style="aspect-ratio: {width} / {height}">'
            f'<img src="data:image/png;base64,{data}" alt=""></div>'
        )
    lit = round(done * _BITS)
    bits = [f'<i class="{"nb-lit" if place * 27 % _BITS < lit else ""}"></i>' for place in range(_BITS)]
    nibbles = "".join(f"<b>{''.join(bits[first : first + 4])}</b>" for first in range(0, _BITS, 4))
    return (
        f'<div class="nb-canvas" aria-hidden="true" style="aspect-ratio: {width} / {height}"><div>{nibbles}</div></div>'
    )


# Bits light up in strides of 27, which is prime to 64: each once, and scattered evenly.
_BITS = 64


def status(precision: str, state: str, text: str, done: float | None = None) -> str:
    """The head of a column: name, what it is, how it stands, and a progress bar while it runs.

    `state` is idle, busy, running, done, stopped or failed; `done` is the finished share, None for an unknown one.
    """
    bar = ""
    if state in ("busy", "running"):
        known = done is not None and state == "running"
        value = f' aria-valuenow="{100 * (done or 0):.0f}" style="--done:{100 * (done or 0):.1f}%"' if known else ""
        kind = "" if known else " nb-unknown"
        bar = (
            f'<div class="nb-bar{kind}" role="progressbar" aria-label="{precision.upper()} progress" '
            f'aria-valuemin="0" aria-valuemax="100"{value}><i></i></div>'
        )
    return (
        f'<div class="nb-head nb-is-{state}"><div class="nb-name"><i class="nb-dot"></i><h2>{precision.upper()}</h2>'
        f"<small>{escape(words.PRECISIONS.get(precision, ''))}</small></div>"
        f'<p class="nb-state" role="status">{escape(text)}</p>{bar or "<div class=nb-bar-rest></div>"}</div>'
    )


def step_status(precision: str, step: Step) -> str:
    """The head while it paints: which step of how many, and about how long it still takes."""
    left = step.seconds / step.index * (step.total - step.index)
    rest = f", about {left:.0f} s left" if left >= 2 else ""
    return status(precision, "running", f"Step {step.index} of {step.total}{rest}", step.index / step.total)


def figures(result: Result | None, results: Mapping[str, Result] | None = None) -> str:
    """What the run cost, beside the 16-bit run where there is one; four empty places before there is a result."""
    if result is None:
        empty = "".join(_figure(name, ("–", "")) for name in ("Time", "A step", "Peak memory", "Model size"))
        return f'<dl class="nb-figures nb-empty">{empty}</dl><p class="nb-how">&nbsp;</p>'
    reference = (results or {}).get(REFERENCE)
    reference = None if reference is result else reference
    speed = step = size = peak = ("", "same")
    if reference is not None:
        speed = words.faster(reference.seconds, result.seconds)
        step = words.faster(reference.ms_per_step, result.ms_per_step)
        size = words.smaller(reference.weight_bytes, result.weight_bytes)
        peak = words.smaller(reference.peak_bytes, result.peak_bytes)
    return (
        '<dl class="nb-figures">'
        + _figure("Time", words.seconds_text(result.seconds), *speed)
        + _figure("A step", words.seconds_text(result.ms_per_step / 1000), *step)
        + _figure("Peak memory", words.bytes_text(result.peak_bytes), *peak)
        + _figure("Model size", words.bytes_text(result.weight_bytes), *size)
        + f'</dl><p class="nb-how">{escape(_how(result))}</p>'
    )


def _how(result: Result) -> str:
    stages = result.stages
    parts = [f"{name} {' '.join(words.seconds_text(stages[name]))}" for name in stages]
    attention = ", 8-bit attention" if result.attention == "8bit" else ""
    return f"{', '.join(parts)} · {result.activation.upper()}{attention}, {result.backend}"


def _figure(name: str, value: tuple[str, str], delta: str = "", tone: str = "same") -> str:
    return (
        f"<div><dt>{name}</dt><dd><b>{value[0]}</b> {value[1]}</dd>"
        f'<dd class="nb-delta nb-{tone}">{delta or "&nbsp;"}</dd></div>'
    )
