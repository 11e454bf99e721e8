"""What attention in 8 bits costs a 4-bit FLUX: PSNR against the 16-bit model's pictures, with either attention.

    python bench/attention_quality.py --json bench/results/attention-quality.json

Held-out cases of the zoo with one seed each, the same for all three (bench/evaluation/cases.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.cases import requests
from bench.evaluation.machine import machine, write_json
from engine import Engine
from engine.devices import pick_device
from engine.metrics import psnr
from engine.models.switches import set_attention

GOAL = 1.0  # dB that 8 bits may cost


def measure(name: str, count: int, device: str) -> dict[str, Any]:
    """PSNR of each picture with 16-bit and with 8-bit attention."""
    exact = Engine.load(name, "bf16", device=device)
    engine = Engine.load(name, "int4", device=device, share=exact)
    found: dict[str, list[float]] = {attention: [] for attention in ("16bit", "8bit")}
    for i, request in enumerate(requests(name, count)):
        wanted = exact.run(request).image
        for attention, values in found.items():
            set_attention(engine.pipe.transformer, attention)
            values.append(round(psnr(wanted, engine.run(request).image), 2))
        print(i, *(values[-1] for values in found.values()), flush=True)
    means = {attention: round(fmean(values), 2) for attention, values in found.items()}
    medians = {attention: round(median(values), 2) for attention, values in found.items()}
    cost = means["16bit"] - means["8bit"]
    return {"model": name, "mean_db": means, "median_db": medians, "cost_db": round(cost, 2), "pictures": found}


def main() -> int:
    """Parse the command line, measure, write JSON where asked; 1 where 8 bits cost more than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where: torch.device = pick_device(options.device)
    row = measure(options.model, options.count, options.device)
    print({key: value for key, value in row.items() if key != "pictures"})
    if options.json:
        write_json(options.json, machine(where) | {"rows": [row]})
    return 0 if row["cost_db"] <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
