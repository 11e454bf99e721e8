"""The report as one HTML file that needs nothing else: pictures, styles and script are inside it."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from engine.quantize.report_chart import along_the_model, layer_rows, role_rows
from engine.quantize.report_pictures import GAIN, Column, difference

if TYPE_CHECKING:
    from engine.quantize.report import Report

__all__ = ["page"]

_ASSETS = Path(__file__).parent / "report_assets"
_LOSSLESS_UP_TO = 512  # pixels a side; above it a PNG of a whole set would make the page too heavy
_WORST = 12
_TRIED = 4  # pictures of the trial on the page; the folder holds all


def page(report: Report, pictures: Path) -> str:
    """The whole page; `pictures` is the folder that holds the files the report names."""
    style, script = ((_ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = f"{report.model} in {report.precision.upper()}"
    body = "\n".join(
        (
            _head(report, title),
            _tiles(report),
            _pictures(report, pictures) if report.columns else "",
            _advice(report, pictures),
            _layers(report),
            _made(report),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}: quality report</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _head(report: Report, title: str) -> str:
    kept = f", {len(report.keep)} patterns kept in 16 bits" if report.keep else ""
    painted = f": the same prompts, the same noise, {report.steps} steps" if report.columns else ""
    return (
        f"<header><p class=kicker>Quality report</p><h1>{_text(title)}</h1>"
        f"<p>4-bit SVDQuant checkpoint, rank {report.rank}{kept}, against its 16-bit model{painted}.</p>"
        f"<p class=soft>{_text(report.device)} · {_text(report.date)}</p></header>"
    )


def _tiles(report: Report) -> str:
    smaller = report.bytes_16bit / max(1, report.bytes_file)
    tiles = [("Size", _mib(report.bytes_file), f"{smaller:.1f} times smaller than {_mib(report.bytes_16bit)}")]
    tiles += _distances(report.columns[1]) if report.columns else []
    errors = [record.error_w4a4 for record in report.layers if record.error_w4a4 is not None]
    naive = [record.naive_error for record in report.layers if record.naive_error is not None]
    if errors and naive:
        against = f"largest; plain rounding: {max(naive):.1%}"
        tiles.append(("Layer error W4A4", f"{max(errors):.1%}", against))
    tiles.append(("Layers", str(len(report.layers)), "groups of linears in 4 bits"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd><p>{note}</p></div>" for name, value, note in tiles)
    return f"<dl class=tiles>{cells}</dl>"


def _distances(column: Column) -> list[tuple[str, str, str]]:
    psnr, lpips = column.mean("psnr"), column.mean("lpips")
    return [
        ("PSNR", "equal" if psnr is None else f"{psnr:.1f} dB", f"{_text(column.label)}, mean, more is better"),
        ("SSIM", f"{column.mean('ssim') or 0:.3f}", "1 is the same picture"),
        ("LPIPS", "–" if lpips is None else f"{lpips:.3f}", "not measured" if lpips is None else "0 is the same"),
    ]


def _pictures(report: Report, folder: Path) -> str:
    exact, *close = report.columns
    cards = []
    for index, painted in enumerate(exact.pictures):
        before = folder / painted.file
        figures = [_figure(before, "BF16", "")]
        figures += [_compared(folder / c.pictures[index].file, before, c, index) for c in close]
        apart = difference(before, folder / close[0].pictures[index].file)
        figures.append(_figure(apart, f"Difference × {GAIN}", f"to {_text(close[0].label)}"))
        cards.append(f"<article><h3>{_text(painted.prompt)}</h3><div class=row>{''.join(figures)}</div></article>")
    return (
        "<section><h2>Before and after</h2>"
        "<p class=soft>Move the slider below a 4-bit picture to uncover the 16-bit one from the left.</p>"
        f"<div class=pictures>{''.join(cards)}</div></section>"
    )


def _figure(picture: Path | Image.Image, name: str, note: str) -> str:
    return (
        f'<figure><div class=frame><img src="{_embedded(picture)}" alt="{name}" loading="lazy"></div>'
        f"<figcaption><b>{name}</b><span>{note}</span></figcaption></figure>"
    )


def _compared(after: Path, before: Path, column: Column, index: int) -> str:
    painted, label = column.pictures[index], _text(column.label)
    decibels = "equal pictures" if painted.psnr is None else f"{painted.psnr:.1f} dB"
    lpips = "" if painted.lpips is None else f", LPIPS {painted.lpips:.3f}"
    return (
        f'<figure class=compare><div class=frame><img src="{_embedded(after)}" alt="{label}" loading="lazy">'
        f'<img class=over src="{_embedded(before)}" alt="" loading="lazy"></div>'
        f"<figcaption><b>{label}</b><span>{decibels}, SSIM {painted.ssim:.3f}{lpips}</span></figcaption>"
        f'<input type=range min=0 max=100 value=0 aria-label="Uncover BF16 over {label}"></figure>'
    )


def _advice(report: Report, folder: Path) -> str:
    advice = report.advice
    if not advice.layers:
        why = (
            f"{advice.outliers} stand out, but the worst alone is too large."
            if advice.outliers
            else "No layer stands out."
        )
        return (
            f"<section><h2>Layers to keep in 16 bits</h2><p><b>None.</b> {why}</p>"
            f"<p class=soft>{report.rule}</p></section>"
        )
    patterns = " ".join(f"'{_text(pattern)}'" for pattern in advice.patterns)
    gained = tried = ""
    if report.trial is not None:
        tried = _trial(report.columns[0], report.trial, folder)
        before, after = report.columns[1].mean("psnr"), report.trial.mean("psnr")
        if before is not None and after is not None:
            gained = (
                f"<p>Tried on the prompts above: PSNR goes from <b>{before:.1f}</b> to <b>{after:.1f} dB</b>, for"
                f" {_mib(advice.added_bytes)} more ({advice.added_bytes / max(1, report.bytes_file):.1%}).</p>"
            )
    names = "".join(f"<li><code>{_text(name)}</code></li>" for name in advice.layers)
    return (
        f"<section><h2>Layers to keep in 16 bits</h2>{gained}{tried}<ul>{names}</ul>"
        f"<pre><code>--keep-16bit {patterns}</code></pre><p class=soft>{report.rule}</p></section>"
    )


def _trial(exact: Column, trial: Column, folder: Path) -> str:
    """The pictures with the suggested layers in 16 bits, each over its 16-bit one."""
    figures = [
        _compared(folder / trial.pictures[index].file, folder / before.file, trial, index)
        for index, before in enumerate(exact.pictures[:_TRIED])
    ]
    return f"<div class='row tried'>{''.join(figures)}</div>"


def _layers(report: Report) -> str:
    worst = layer_rows(report.layers, report.activation, limit=_WORST)
    everything = layer_rows(report.layers, report.activation)
    head = "<tr><th>Layer</th><th>N × K</th><th class=wide>Error: plain rounding, W4A4, W4A8</th></tr>"
    return (
        "<section><h2>Error of each layer</h2>"
        f"<p class=soft>‖y − ŷ‖ / ‖y‖ of a layer's output, {_text(report.layers_source)}. Plain rounding is the nearest"
        " 4-bit value for weights and inputs alike, without smoothing and without the low-rank branch.</p>"
        "<p class=legend><span class=naive>plain rounding</span>"
        "<span class=a4>W4A4</span><span class=a8>W4A8</span><em>logarithmic scale</em></p>"
        f"{along_the_model(report.layers)}<h3>By role</h3><table>{role_rows(report.layers)}</table>"
        f"<h3>The worst {min(_WORST, len(report.layers))}</h3><table>{head}{worst}</table>"
        f"<details><summary>All {len(report.layers)} layers</summary>"
        '<p class=tools><input type=search placeholder="Filter by name" aria-label="Filter by name">'
        "<button type=button data-sort=error>Worst first</button>"
        "<button type=button data-sort=index>Model order</button></p>"
        f"<table id=all>{head}{everything}</table></details></section>"
    )


def _made(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = "".join(
        f"<tr><td>{_text(column.label)}</td><td>{_text(column.backend)}</td><td>{_mib(column.weight_bytes)}</td></tr>"
        for column in report.columns
    )
    notes = "".join(f"<p>{_text(note)}</p>" for note in report.notes)
    return (
        "<section><h2>How this was made</h2>"
        "<table><tr><th>Column</th><th>Backend</th><th>Transformer in memory</th></tr>"
        f"{rows}</table>{notes}<p class=soft>{_text(versions)}. Pictures lie in <code>pictures/</code> beside this"
        " page, each with the settings that make it again; <code>report.json</code> holds every figure.</p></section>"
    )


def _embedded(picture: Path | Image.Image) -> str:
    """A data URL: lossless where the picture is small, else WebP at high quality."""
    image = Image.open(picture) if isinstance(picture, Path) else picture
    small = max(image.size) <= _LOSSLESS_UP_TO
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "WEBP", lossless=small, quality=75 if small else 92)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _mib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _text(value: str) -> str:
    return html.escape(value)
