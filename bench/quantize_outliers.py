"""What planted activation outliers cost a layer in 4 bits: this quantizer at several ranks, and rounding to nearest.

    python bench/quantize_outliers.py --json bench/results/quantize-outliers.json

A layer of 512 x 512 Gaussian weights reads Gaussian rows of which one channel in a group of 64 is `size` times the
others. Half of the rows are for calibration, errors are those of the other half with 4-bit weights and activations,
mean of three seeds: ||y - y_hat|| / ||y_0||, y_0 being the output without outliers, since a few huge channels make y
itself large and any error look small beside it. Growth is the error over that at size 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from engine.quantize import Recipe
from engine.quantize.inputs import Inputs
from engine.quantize.layer import output_errors, quantize_group
from engine.quantize.naive import naive_error

WIDTH, ROWS, SEEDS = 512, 2048, 3
SIZES, RANKS = (1, 10, 30, 100, 300), (0, 16, 32, 64)


def errors(size: float, seed: int) -> dict[str, float]:
    """The error of each rank and of rounding to nearest."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(WIDTH, WIDTH, generator=draw) * WIDTH**-0.5
    rows = torch.randn(2 * ROWS, WIDTH, generator=draw)
    plain = (rows[ROWS:] @ weight.T).norm()
    rows[:, torch.arange(0, WIDTH, 64) + torch.randint(64, (WIDTH // 64,), generator=draw)] *= size
    seen, other = (Inputs(part, part.abs().amax(0)) for part in rows.split(ROWS))
    assert other.rows is not None
    size_of_output = float((other.rows @ weight.T).norm() / plain)
    found = {"nearest": naive_error(weight, other.rows, "svdq", "int4")}
    for rank in RANKS:
        linear = quantize_group(weight, seen, Recipe(rank=rank)).linear
        found[str(rank)] = output_errors(weight, linear, other)[0]
    return {name: value * size_of_output for name, value in found.items()}


def measure() -> dict[str, Any]:
    """Mean errors of each outlier size."""
    table = {}
    for size in SIZES:
        rows = [errors(size, seed) for seed in range(SEEDS)]
        table[str(size)] = {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}
        print(size, table[str(size)], flush=True)
    first, last = table[str(SIZES[0])], table[str(SIZES[-1])]
    return {
        "machine": machine(torch.device("cpu")),
        "errors": table,
        "growth": {name: round(last[name] / first[name], 2) for name in first},
    }


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(argv)
    with torch.inference_mode():
        told = measure()
    print(json.dumps(told["growth"]))
    if options.json:
        write_json(options.json, told)


if __name__ == "__main__":
    main()
