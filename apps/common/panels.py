"""The written parts of the page: sign, banner, messages, explanation, footer. Markup only; all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from apps.common.app import App
from apps.common.models import Choice
from apps.common.pool import Pool
from engine.models import catalogue
from engine.models.catalogue import ModelSpec
from safety import Verdict

__all__ = [
    "banner",
    "explanation",
    "footer",
    "header",
    "house_footer",
    "light_switch",
    "message",
    "refusal",
    "rooms",
    "seen",
    "sign",
    "withheld",
]

ASSETS = Path(__file__).with_name("assets")


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def sign(nibble: int, size: int = 36) -> str:
    """The suite's sign: four squares, the four bits of `nibble`, most significant first; a set bit is lit."""
    squares = "".join(
        f'<rect class="nb-bit{" nb-lit" if nibble >> (3 - place) & 1 else ""}" '
        f'x="{1 + 17 * (place % 2)}" y="{1 + 17 * (place // 2)}" width="14" height="14" rx="3.5"/>'
        for place in range(4)
    )
    return f'<svg class="nb-sign" width="{size}" height="{size}" viewBox="0 0 33 33" aria-hidden="true">{squares}</svg>'


def header(app: App, house: Sequence[App] = ()) -> str:
    """Sign, name of the suite and the app, one sentence, the light switch; and the way to the other apps of a house."""
    return (
        f'{rooms(house, app.slug)}<header class="nb-header"><div class="nb-brand">{sign(app.nibble, 40)}'
        f"<div><p>Nibble Studio</p><h1>{escape(app.title)}</h1></div></div>"
        f'<p class="nb-summary">{escape(app.summary)}</p>'
        f"{light_switch()}</header>"
    )


def light_switch() -> str:
    """The button between day and night."""
    label = "Switch between light and dark"
    return f'<button type="button" id="nb-light" class="nb-light" aria-label="{label}">{_asset("light.svg")}</button>'


def rooms(house: Sequence[App], here: str) -> str:
    """Links to all apps of a house, side by side; nothing where an app stands alone. `here` is the open one's slug."""
    if not house:
        return ""
    links = "".join(
        f'<a href="{app.slug}"{" aria-current=page" if app.slug == here else ""}>{sign(app.nibble, 16)}'
        f"{escape(app.title)}</a>"
        for app in house
    )
    return f'<nav class="nb-rooms" aria-label="Apps"><a href="./">All apps</a>{links}</nav>'


def banner(choice: Choice, pool: Pool, app: App) -> str:
    """Which model, device and kernels are in use and why, how loading stands, and how to get the large models."""
    engines = pool.engines()
    device = next((_device(engine) for engine in engines), "none in use" if pool.settled else "starting")
    kernels = next((engine for engine in engines if engine.precision != "bf16"), next(iter(engines), None))
    facts = {"Model": choice.spec.title, "Device": device}
    held = next((_held(engine) for engine in engines), "")
    if held:
        facts["Memory in use"] = held
    if kernels is not None:
        facts["Kernels"] = f"{kernels.backend}, {kernels.activation.upper()}"
    chips = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return (
        f'<div class="nb-banner" data-longest="{_longest_upload(choice.spec)}">'
        f'<dl class="nb-facts">{chips}</dl>{_loading(pool)}'
        f'<details class="nb-why"><summary>Why this model, and how to get others</summary>'
        f"<p>{escape(choice.reason)}</p>{_others(choice, app)}</details></div>"
    )


def _longest_upload(spec: ModelSpec) -> int:
    """Pixels of the longer side to which the page brings a larger picture before it is sent: twice what is painted."""
    return min(2048, 2 * int(spec.size.high))


def _device(engine: object) -> str:
    device = str(getattr(engine, "device", "cpu"))
    if not device.startswith("cuda"):
        return "CPU"
    import torch

    return torch.cuda.get_device_name(device)


def _held(engine: object) -> str:
    device = str(getattr(engine, "device", "cpu"))
    if not device.startswith("cuda"):
        return ""
    from apps.common import gpus

    return gpus.memory(device)


def _loading(pool: Pool) -> str:
    states = {precision: pool.state(precision) for precision in pool.precisions}
    failed = {precision.upper(): state.text for precision, state in states.items() if state.state == "failed"}
    if failed:
        # One cause mostly stops them all; the first reason says what to do.
        text = f"{' and '.join(failed)} could not be loaded. {next(iter(failed.values()))}"
        return f'<p class="nb-load nb-load-failed" role="alert"><i></i>{escape(text)}</p>'
    busy = next((state.text for state in states.values() if state.state == "loading"), None)
    if not pool.settled:
        text = busy or "getting ready"
        return f'<p class="nb-load nb-load-busy" role="status"><i></i>{escape(text[:1].upper() + text[1:])} …</p>'
    return '<p class="nb-load nb-load-ready" role="status"><i></i>Ready</p>'


def _others(choice: Choice, app: App) -> str:
    rows = [catalogue.resolve(name) for name in app.models]
    large = [spec for spec in rows if not spec.local and spec.name != choice.spec.name]
    lines = "".join(
        f"<li><b>{escape(spec.title)}</b>, {spec.download_gib:.0f} GiB to download, {escape(spec.licence)}"
        f"{', licence to accept on the hub first' if spec.gated else ''}: "
        f"<code>python apps/{app.slug}/run.py --model {escape(_short(spec.name))}</code></li>"
        for spec in large
    )
    return f"<p>Larger models want a CUDA device; their weights are fetched once.</p><ul>{lines}</ul>" if lines else ""


def _short(name: str) -> str:
    return next((alias for alias, full in catalogue.ALIASES.items() if full == name), name)


def seen(words: str) -> str:
    """The words beside what the model really saw."""
    return (
        f'<div class="nb-title"><h3>{escape(words)}</h3>'
        "<small>Made from what you gave, the same for every column.</small></div>"
    )


def message(text: str, tone: str = "problem") -> str:
    """A line under the prompt: `tone` is "problem" or "note"; no markup at all for an empty text."""
    return f'<p class="nb-message nb-{tone}" role="alert">{escape(text)}</p>' if text else ""


def refusal(verdict: Verdict) -> str:
    """A refused prompt: the reason, who judged, and that nothing was changed."""
    return _refused("This prompt was refused", verdict, "Nothing was painted, and your prompt is as you wrote it.")


def withheld(verdict: Verdict) -> str:
    """A picture that was painted and not shown: the reason, who judged, and what became of it."""
    return _refused("The picture is not shown", verdict, "It is kept nowhere, and your prompt is as you wrote it.")


def _refused(title: str, verdict: Verdict, rest: str) -> str:
    category = escape((verdict.category or "not allowed").replace("_", " "))
    return (
        f'<div class="nb-refusal" role="alert"><h3>{title}</h3><p>{escape(verdict.reason)}</p>'
        f"<p><small>Category: {category}. Checker: {escape(verdict.checker)}, score {verdict.score:.2f}. {rest}"
        "</small></p></div>"
    )


def explanation(app: App) -> str:
    """What the page shows and how 4-bit weights can do it, with a drawing."""
    return (
        '<section class="nb-section nb-about"><div class="nb-section-head"><h2>What am I looking at?</h2></div>'
        f'<div class="nb-about-body"><div>{_asset("about.html")}{app.about}</div>'
        f"{_asset('svdquant.svg')}</div></section>"
    )


def footer(choice: Choice) -> str:
    """Licence of the model in use, and the programming interface: its page here, and its OpenAPI description."""
    spec = choice.spec
    return _foot(f"Model in use: {escape(spec.title)}, {escape(spec.licence or 'see its model card')}. ")


def house_footer() -> str:
    """The same for the page that leads to all apps."""
    return _foot("Each app loads its model when its page is opened first. ")


def _foot(words: str) -> str:
    return (
        f'<footer class="nb-footer"><p>{sign(0b1111, 16)} Nibble Studio, Apache-2.0. {words}'
        "Pictures are made by a machine; say so where you share them.</p>"
        '<nav><button type="button" id="nb-api">Use by API or MCP</button>'
        '<a href="gradio_api/openapi.json" target="_blank" rel="noopener">OpenAPI</a></nav></footer>'
    )
