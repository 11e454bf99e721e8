"""Figures of all precisions and sets as one table, and as values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.evaluation.scores import Column

__all__ = ["COLUMNS", "figures", "markdown"]

# figure -> heading, how to write it; more is better unless the heading says otherwise
COLUMNS = {
    "psnr": ("PSNR dB", "{:.2f}"),
    "psnr_tenth": ("worst tenth", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS ↓", "{:.4f}"),
    "clip": ("CLIPScore", "{:.2f}"),
    "image-reward": ("ImageReward", "{:.3f}"),
    "fid": ("FID ↓", "{:.2f}"),
    "objects": ("objects right", "{:.1%}"),
    "strict": ("with size, material", "{:.1%}"),
    "relations": ("relations right", "{:.1%}"),
    "counted": ("count right", "{:.1%}"),
}


def figures(column: Column) -> dict[str, float]:
    """Means over the pictures, and figures of the set. Equal pictures have no PSNR: `equal` says how many there are."""
    found: dict[str, float] = {}
    for metric, scores in column.scores.items():
        values = [value for value in scores.values() if math.isfinite(value)]
        if metric == "psnr":
            found["equal"] = 1 - len(values) / len(scores)
        if not values:
            continue
        found[metric] = float(np.mean(values))
        if metric == "psnr":
            found["psnr_tenth"] = float(np.quantile(values, 0.1))
    return found | column.figures


def markdown(results: Mapping[str, Sequence[Column]], counts: Mapping[str, int], about: Mapping[str, Any]) -> str:
    """One table: a row for each set and precision, a column for each figure that any of them has."""
    rows = [(name, column.precision, figures(column)) for name, columns in results.items() for column in columns]
    shown = [key for key in COLUMNS if any(key in values for _, _, values in rows)]
    heads = ["set", "pictures", "precision", *(COLUMNS[key][0] for key in shown)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, precision, values in rows:
        cells = [_cell(key, values) for key in shown]
        lines.append("| " + " | ".join([name, str(counts[name]), precision, *cells]) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        f"{about['device']}, {about['date']}. {versions}. PSNR, SSIM and LPIPS are against the first precision.",
    ]
    return "\n".join(lines) + "\n"


def _cell(key: str, values: Mapping[str, float]) -> str:
    if key in values:
        return COLUMNS[key][1].format(values[key])
    return "equal" if key == "psnr" and values.get("equal") == 1 else "–"
