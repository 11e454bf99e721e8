"""Errors as pictures: along the model, by role, and a bar a layer."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from statistics import median

from engine.quantize.records import LayerRecord
from engine.quantize.report_advice import error_of, role

__all__ = ["along_the_model", "layer_rows", "role_rows"]

_SERIES = (("naive", "naive_error"), ("a4", "error_w4a4"), ("a8", "error_w4a8"))
_HEIGHT, _LEFT, _TOP, _BOTTOM = 220, 44, 8, 20
_TICKS = tuple(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5))


def along_the_model(records: Sequence[LayerRecord]) -> str:
    """An SVG with a dot a layer and measure, in the order the model runs them."""
    if not records:
        return ""
    gap = max(4.0, 1000 / len(records))
    width = _LEFT + gap * len(records) + 8
    low, top = _smallest(records), _largest(records)
    # Errors differ by factors, and one bad layer must not flatten all others: a logarithmic scale.
    share = lambda error: math.log(max(error, low) / low) / math.log(top / low)  # noqa: E731
    down = lambda error: _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share(error))  # noqa: E731
    parts = []
    for tick in (tick for tick in _TICKS if low <= tick <= top):
        y = down(tick)
        parts.append(f'<line x1="{_LEFT}" x2="{width:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:g}%</text>')
    for index, record in enumerate(records):
        x = _LEFT + gap * (index + 0.5)
        for name, field in _SERIES:
            if (error := getattr(record, field)) is not None:
                told = f"{html.escape(record.name)}: {error:.2%}"
                parts.append(
                    f'<circle class={name} cx="{x:.1f}" cy="{down(error):.1f}" r="2.6"><title>{told}</title></circle>'
                )
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">first layer</text>')
    parts.append(f'<text x="{width - 8:.0f}" y="{_HEIGHT - 4}" text-anchor="end">last</text>')
    return (
        f'<div class=chart><svg viewBox="0 0 {width:.0f} {_HEIGHT}" style="min-width:{0.7 * width:.0f}px"'
        f' role=img aria-label="Error of each layer along the model">{"".join(parts)}</svg></div>'
    )


def role_rows(records: Sequence[LayerRecord]) -> str:
    """Table rows: layers of one role, how many, and their median error in each measure."""
    groups: dict[str, list[LayerRecord]] = {}
    for record in records:
        groups.setdefault(role(record.name), []).append(record)
    rows = ["<tr><th>Role</th><th>Layers</th><th class=wide>Median error: plain rounding, W4A4, W4A8</th></tr>"]
    middles = {name: _middles(members) for name, members in groups.items()}
    top = max([1e-6, *(value for found in middles.values() for value in found.values() if value is not None)])
    for name, members in groups.items():
        bars = _bars(middles[name], top)
        rows.append(f"<tr><td><code>{_breakable(name)}</code></td><td>{len(members)}</td><td>{bars}</td></tr>")
    return "".join(rows)


def _middles(records: Sequence[LayerRecord]) -> dict[str, float | None]:
    """The median of each measure, over the records that have it."""
    found = {key: [v for r in records if (v := getattr(r, field)) is not None] for key, field in _SERIES}
    return {key: median(values) if values else None for key, values in found.items()}


def layer_rows(records: Sequence[LayerRecord], activation: str, limit: int | None = None) -> str:
    """Table rows, a layer each: the worst ones first where there is a `limit`, else in the model's order."""
    order = (
        sorted(range(len(records)), key=lambda i: -error_of(records[i], activation)) if limit else range(len(records))
    )
    top = _largest(records)
    rows = []
    for index in list(order)[:limit]:
        record = records[index]
        n, k = record.shape
        bars = _bars({key: getattr(record, field) for key, field in _SERIES}, top)
        rows.append(
            f'<tr data-index="{index}" data-error="{error_of(record, activation):.6f}">'
            f"<td><code>{_breakable(record.name)}</code></td><td>{n} × {k}</td><td>{bars}</td></tr>"
        )
    return "".join(rows)


def _bars(errors: dict[str, float | None], top: float) -> str:
    bars = []
    for name, error in errors.items():
        if error is not None:
            bars.append(f'<i class={name} style="width:{100 * error / top:.1f}%"></i><em>{error:.2%}</em>')
    return f"<div class=bars>{''.join(f'<div>{bar}</div>' for bar in bars)}</div>"


def _breakable(name: str) -> str:
    """A name that may break after its dots and bars, so that a table fits a phone."""
    return html.escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _largest(records: Sequence[LayerRecord]) -> float:
    errors = [v for record in records for _, field in _SERIES if (v := getattr(record, field)) is not None]
    return max([*errors, 1e-6]) * 1.05


def _smallest(records: Sequence[LayerRecord]) -> float:
    errors = [v for record in records for _, field in _SERIES if (v := getattr(record, field))]
    return max(min([*errors, 1.0]), 1e-4) / 1.1
