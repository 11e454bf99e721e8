"""The tables as pictures: bars a figure, PSNR of every picture in order, a sheet of examples, and bars of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from bench.evaluation.painting import picture_path
from bench.evaluation.scores import Column
from bench.evaluation.sets import PromptSet
from bench.evaluation.table import COLUMNS, figures
from bench.evaluation.times import Row, summary

__all__ = ["bars", "curves", "durations", "sheet"]

_COLORS = ("#6d6b65", "#5d9a17", "#2f74b5", "#c2571a", "#8a4fb0", "#b8860b", "#1f8a8a")
_TILE, _EXAMPLES, _MARGIN, _LINE = 192, 8, 12, 18


def bars(name: str, columns: Sequence[Column], path: Path) -> None:
    """A panel for each figure of a set, a bar for each precision."""
    values = {column.precision: figures(column) for column in columns}
    keys = [key for key in COLUMNS if any(key in found for found in values.values())]
    if not keys:
        return
    plt = _pyplot()
    across = min(4, len(keys))
    down = math.ceil(len(keys) / across)
    figure, axes = plt.subplots(down, across, figsize=(3.1 * across, 2.6 * down), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        found = [(precision, v[key]) for precision, v in values.items() if key in v]
        drawn = axis.bar(range(len(found)), [v for _, v in found], color=[_color(columns, p) for p, _ in found])
        axis.bar_label(drawn, [COLUMNS[key][1].format(v) for _, v in found], fontsize=8)
        axis.set_xticks(range(len(found)), [p for p, _ in found], rotation=20, ha="right", fontsize=8)
        axis.set_title(COLUMNS[key][0], fontsize=10)
        axis.margins(y=0.18)
        if "%" in COLUMNS[key][1]:
            axis.yaxis.set_major_formatter("{x:.0%}")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(keys) :]:
        axis.set_visible(False)
    figure.suptitle(name)
    _save(plt, figure, path)


def curves(name: str, columns: Sequence[Column], path: Path) -> None:
    """PSNR of every picture, the worst first: how bad the bad ones are, not the mean alone."""
    found = {c.precision: sorted(v for v in c.scores.get("psnr", {}).values() if math.isfinite(v)) for c in columns}
    found = {precision: values for precision, values in found.items() if values}
    if not found:
        return
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for precision, values in found.items():
        share = [100 * (i + 0.5) / len(values) for i in range(len(values))]
        axis.plot(
            share, values, label=precision, color=_color(columns, precision), marker="." if len(values) < 30 else ""
        )
    axis.set_xlabel("pictures, worst first (%)")
    axis.set_ylabel("PSNR dB")
    axis.set_title(f"{name}: against {columns[0].precision}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(plt, figure, path)


def durations(rows: Sequence[Row], path: Path) -> None:
    """A panel for each model and mode of bench/latency.py: the median of each precision, from its p10 to its p90."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.times:
            panels.setdefault(f"{row.model}, {row.mode}", []).append(row)
    if not panels:
        return
    plt = _pyplot()
    figure, axes = plt.subplots(len(panels), 1, figsize=(6.4, sum(0.8 + 0.35 * len(p) for p in panels.values())))
    for axis, (title, found) in zip(axes if len(panels) > 1 else [axes], panels.items(), strict=True):
        told = [summary(row) for row in found]
        middles = [figures["p50"] for figures in told]
        apart = [[t["p50"] - t["p10"] for t in told], [t["p90"] - t["p50"] for t in told]]
        colors = [_COLORS[index % len(_COLORS)] for index in range(len(found))]
        drawn = axis.barh([row.precision for row in found], middles, xerr=apart, color=colors, capsize=3)
        axis.bar_label(drawn, [f"{value:.1f} ms" for value in middles], fontsize=8, padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    _save(plt, figure, path)


def sheet(prompts: PromptSet, folders: dict[str, Path], path: Path) -> None:
    """The first pictures of a set, a row a prompt and a column a precision."""
    items = prompts.items[:_EXAMPLES]
    width = _MARGIN + len(folders) * (_TILE + _MARGIN)
    row = _TILE + 2 * _LINE + _MARGIN
    page = Image.new("RGB", (width, _LINE + _MARGIN + row * len(items)), "white")
    draw = ImageDraw.Draw(page)
    draw.font = ImageFont.load_default(13)
    for across, (precision, folder) in enumerate(folders.items()):
        x = _MARGIN + across * (_TILE + _MARGIN)
        draw.text((x, _MARGIN // 2), precision, fill="black")
        for down, item in enumerate(items):
            with Image.open(picture_path(folder, item)) as image:
                page.paste(image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.LANCZOS),
                           (x, _LINE + _MARGIN + down * row))  # fmt: skip
    for down, item in enumerate(items):
        text = item.prompt
        while text and draw.textlength(text) > width - 2 * _MARGIN:
            text = text[:-2].rstrip("…") + "…"
        draw.text((_MARGIN, _LINE + _MARGIN + down * row + _TILE + 4), text, fill="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def _color(columns: Sequence[Column], precision: str) -> str:
    """A precision keeps its color in every picture."""
    return _COLORS[[column.precision for column in columns].index(precision) % len(_COLORS)]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
