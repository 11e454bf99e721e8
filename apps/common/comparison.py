"""The part of the page that lays two pictures over each other: slider, difference map, and two numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from apps.common import compare, words
from apps.common.columns import REFERENCE
from apps.common.pictures import Pictures
from engine import Result

__all__ = [
    "AMPLIFICATION",
    "Comparison",
    "Shot",
    "build",
    "drawn",
    "legend",
    "pair",
    "scored",
    "scores",
    "shown",
    "verdict",
]

AMPLIFICATION = 8
_LPIPS = (
    '<div><dt>LPIPS</dt><dd class="nb-number">{:.3f}</dd>'
    "<dd>As a network trained on what people see judges. 0 means the same.</dd></div>"
)


@dataclass(frozen=True)
class Comparison:
    """The components; `shots` is session state: the pictures of the last run, by precision."""

    verdict: gr.HTML
    scores: gr.HTML
    slider: gr.ImageSlider
    map: gr.Image
    amplify: gr.Slider
    legend: gr.HTML
    other: gr.Radio
    shots: gr.State


@dataclass(frozen=True)
class Shot:
    """One picture of the run on show: its file and its result."""

    path: str
    result: Result


def build(precisions: Sequence[str]) -> Comparison:
    """Lay out the comparison; the style sheet hides it as long as the slider has no pictures."""
    others = [precision for precision in precisions if precision != pair(precisions)[0]] or list(precisions)
    with gr.Column(elem_id="nb-compare", elem_classes=["nb-section"]):
        line = gr.HTML(elem_id="nb-verdict")
        other = gr.Radio(
            [(name.upper(), name) for name in others], value=others[0], label="Compare with", visible=len(others) > 1
        )
        with gr.Row(elem_classes=["nb-pair"]):
            with gr.Column(elem_classes=["nb-card"], min_width=300):
                right = others[0].upper() if len(others) == 1 else "the other"
                gr.HTML(_title("Slide between them", f"{pair(precisions)[0].upper()} left, {right} right"))
                slider = gr.ImageSlider(
                    type="filepath",
                    format="png",
                    show_label=False,
                    interactive=False,
                    max_height=640,
                    buttons=["fullscreen"],
                    elem_id="nb-slider",
                    elem_classes=["nb-picture"],
                )
                numbers = gr.HTML(elem_id="nb-scores")
            with gr.Column(elem_classes=["nb-card"], min_width=300):
                gr.HTML(_title("Where they differ", "each pixel, mean of its three channels"))
                difference = gr.Image(
                    type="filepath",
                    format="png",
                    show_label=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="nb-map",
                    elem_classes=["nb-picture"],
                    alt_text="Map of the differences between the two pictures",
                )
                key = gr.HTML(legend(AMPLIFICATION))
                amplify = gr.Slider(1, 32, AMPLIFICATION, step=1, label="Amplify the difference", elem_id="nb-amplify")
    return Comparison(line, numbers, slider, difference, amplify, key, other, gr.State({}))


def pair(precisions: Sequence[str]) -> tuple[str, str]:
    """The two precisions compared first: the 16-bit one (or the first) and the first other."""
    reference = REFERENCE if REFERENCE in precisions else precisions[0]
    return reference, next((name for name in precisions if name != reference), reference)


def shown(parts: Comparison, shots: Mapping[str, Shot], other: str, amplify: float, pictures: Pictures) -> dict:
    """Updates that lay the reference picture and `other` over each other; none while there is only one picture."""
    if len(shots) < 2:
        return {}
    first, second = _shown_pair(shots, other)
    return {
        parts.verdict: verdict(first.result, second.result),
        parts.scores: scores(first.result, second.result),
        parts.slider: gr.update(value=(first.path, second.path)),
        parts.map: drawn(first, second, amplify, pictures),
        parts.legend: legend(amplify),
    }


def _shown_pair(shots: Mapping[str, Shot], other: str) -> tuple[Shot, Shot]:
    reference, fallback = pair(list(shots))
    return shots[reference], shots[other if other in shots and other != reference else fallback]


def drawn(first: Shot, second: Shot, amplify: float, pictures: Pictures) -> str:
    """Path of the difference map of two pictures."""
    return pictures.save_map(compare.difference_map(first.result.image, second.result.image, amplify))


def verdict(a: Result, b: Result) -> str:
    """Say what `b` saved beside `a`."""
    speed, _ = words.faster(a.seconds, b.seconds)
    size, _ = words.smaller(a.weight_bytes, b.weight_bytes)
    return (
        f'<div class="nb-section-head"><h2>{escape(b.precision.upper())} is {speed.replace("same speed", "as fast")}'
        f" and {size.replace('same size', 'as large')}</h2>"
        f"<p>The same prompt, seed and noise as {escape(a.precision.upper())}: seed {a.seed}, {a.request.steps} "
        f"step{'s' * (a.request.steps != 1)}, {a.request.width} × {a.request.height} pixels.</p></div>"
    )


def scores(a: Result, b: Result, lpips: float | None = None) -> str:
    """How close the two pictures are: PSNR, SSIM and LPIPS where it is known, each with a line on how to read it."""
    score = compare.scores(a.image, b.image)
    third = "" if lpips is None else _LPIPS.format(lpips)
    return (
        '<dl class="nb-scores">'
        f'<div><dt>PSNR</dt><dd class="nb-number">{words.decibels(score.psnr)}</dd>'
        "<dd>Pixel by pixel. Above 30 the eye hardly tells them apart.</dd></div>"
        f'<div><dt>SSIM</dt><dd class="nb-number">{score.ssim:.3f}</dd>'
        f"<dd>Edges and structure. 1 means the same.</dd></div>{third}</dl>"
    )


def scored(parts: Comparison, shots: Mapping[str, Shot], other: str) -> dict:
    """The scores once more, with LPIPS; nothing where it is not at hand. It is taken last: the first time it loads."""
    distance = compare.perceptual() if len(shots) > 1 else None
    if distance is None:
        return {}
    first, second = _shown_pair(shots, other)
    lpips = distance(first.result.image, second.result.image)
    return {parts.scores: scores(first.result, second.result, lpips)}


def legend(amplify: float) -> str:
    """The colours of the map with the difference, in levels of 255, where each end stands."""
    stops = compare.colour_map()[::32].tolist() + compare.colour_map()[-1:].tolist()
    colours = ", ".join(f"rgb({r} {g} {b})" for r, g, b in stops)
    top = 255 / amplify
    return (
        f'<div class="nb-legend"><span>0</span><i style="background:linear-gradient(90deg, {colours})"></i>'
        f"<span>{top:.0f}{'+' if amplify > 1 else ''} of 255</span></div>"
    )


def _title(title: str, note: str) -> str:
    return f'<div class="nb-title"><h3>{escape(title)}</h3><small>{escape(note)}</small></div>'
