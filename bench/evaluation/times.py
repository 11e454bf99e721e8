"""The times of one run of bench/latency.py, their percentiles, and the table of them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Row", "summary", "table"]

TRIMMED = 0.2  # of the times, half at either end: left out of `trimmed_mean`


@dataclasses.dataclass
class Row:
    """One precision in one mode; times in milliseconds, bytes of the transformer and of all that a run needs."""

    model: str
    precision: str
    mode: str
    backend: str = ""
    activation: str = ""
    times: list[float] = dataclasses.field(default_factory=list)
    stages: list[dict[str, float]] = dataclasses.field(default_factory=list)
    load_seconds: float = 0.0
    weight_bytes: int = 0
    peak_bytes: int = 0
    error: str = ""


def summary(row: Row) -> dict[str, Any]:
    """Percentiles and means of a row's times, in milliseconds; empty for a row without times."""
    if not row.times:
        return {}
    times = sorted(row.times)
    cut = int(TRIMMED * len(times) / 2)
    kept = times[cut : len(times) - cut]
    percentiles = {f"p{p}": float(np.percentile(times, p)) for p in (10, 50, 90, 99)}
    stages = {key: statistics.median(stage[key] for stage in row.stages) for key in (row.stages or [{}])[0]}
    means = {"mean": statistics.fmean(times), "trimmed_mean": statistics.fmean(kept)}
    spread = {"best": times[0], "worst": times[-1], "deviation": statistics.pstdev(times)}
    return {**percentiles, **means, **spread, "median_stages": stages}


def table(rows: Sequence[Row], about: dict[str, Any], how: str) -> str:
    """The rows as Markdown, each beside the first precision of its model and mode."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']} ({about['processor']}, {about['threads']} of {about['cores']} threads), {about['date']},"
        f" load {about['load_1min']} at the start; {how}. {versions}.",
        "",
        "| model | mode | precision | backend | median ms | p10 to p90 | best | speed | weights MiB | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[tuple[str, str], float] = {}
    for row in rows:
        if not row.times:
            lines.append(f"| {row.model} | {row.mode} | {row.precision} | failed: {row.error} |" + " |" * 6)
            continue
        figures = summary(row)
        base = first.setdefault((row.model, row.mode), figures["p50"])
        lines.append(
            f"| {row.model} | {row.mode} | {row.precision} | {row.backend} {row.activation} | {figures['p50']:.1f} |"
            f" {figures['p10']:.1f} to {figures['p90']:.1f} | {figures['best']:.1f} | {base / figures['p50']:.2f}x |"
            f" {row.weight_bytes / 2**20:.1f} | {row.peak_bytes / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"
