"""How far the pictures of 4-bit models are from those of BF16: this quantizer and others, on the models of the zoo.

    python bench/rivals.py --work runs/rivals --json bench/results/rivals.json
    python bench/rivals.py --models tiny tiny-sana --methods naive ours-w4a4 --count 8

Held-out captions, one seed each, the same noise in every method (bench/evaluation/cases.py); PSNR in dB against the
BF16 picture of the same request. The methods and what runs them: bench/evaluation/methods.py; bitsandbytes and torchao
must be installed for theirs. Pictures and checkpoints stay in --work, and a run that was ended goes on from them; new
weights want a new folder.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.cases import MODELS, requests
from bench.evaluation.machine import machine, write_json
from bench.evaluation.methods import METHODS, claim, open_engine
from engine import Engine
from engine.errors import EngineError
from engine.metrics import psnr
from engine.models.catalogue import resolve
from engine.request import Request

_MOST = 60.0  # decibels counted for a picture that is equal


def paint(load: Callable[[], Engine], wanted: list[Request], folder: Path) -> Engine | None:
    """Paint what `folder` does not hold yet; returns the engine if it was needed."""
    folder.mkdir(parents=True, exist_ok=True)
    engine: Engine | None = None
    for number, request in enumerate(wanted):
        path = folder / f"{number:03d}.png"
        if not path.exists():
            engine = engine or load()
            engine.run(request).save(path)
    return engine


def distances(folder: Path, exact: Path, count: int) -> list[float]:
    """PSNR of each picture in dB."""
    found = []
    for number in range(count):
        with Image.open(exact / f"{number:03d}.png") as first, Image.open(folder / f"{number:03d}.png") as second:
            found.append(min(_MOST, psnr(first, second)))
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All models in all methods; the figures so far are written after each."""
    told = {"machine": machine(torch.device("cpu")), "pictures": options.count, "calibration_pictures": options.samples,
            "methods": {name: {"title": METHODS[name].title, "bits": METHODS[name].bits, "run_by": METHODS[name].by}
                        for name in options.methods},
            "psnr": {name: {} for name in options.methods}}  # fmt: skip
    for model in options.models:
        spec, wanted = resolve(model), requests(model, options.count)
        claim(options.work, spec, options.samples)
        exact = options.work / model / "bf16"
        first = paint(lambda spec=spec: Engine.load(spec, "bf16", device="cpu"), wanted, exact)
        for name in options.methods:
            folder = options.work / model / name
            paint(lambda n=name, s=spec, f=first: open_engine(n, s, options.work, options.samples, f), wanted, folder)
            values = distances(folder, exact, options.count)
            error = math.sqrt(sum((v - fmean(values)) ** 2 for v in values)) / len(values)
            told["psnr"][name][model] = {"mean": round(fmean(values), 2), "standard_error": round(error, 2)}
            print(f"{model} {name}: {fmean(values):.2f} dB", flush=True)
            if options.json:
                write_json(options.json, told)
    return told


def table(told: dict[str, Any]) -> str:
    """The figures as a Markdown table, the best of a column in bold."""
    models = list(dict.fromkeys(model for row in told["psnr"].values() for model in row))
    rows = {name: [row[model]["mean"] for model in models] for name, row in told["psnr"].items()}
    rows = {name: [*values, round(fmean(values), 2)] for name, values in rows.items()}
    best = [max(column) for column in zip(*rows.values(), strict=True)]
    heads = [model.removeprefix("tiny-").replace("tiny", "FLUX") for model in models]
    lines = [f"| | | {' | '.join(heads)} | mean |", "|---" * (len(heads) + 3) + "|"]
    for name, values in rows.items():
        cells = (
            f"**{value:.1f}**" if value == top else f"{value:.1f}" for value, top in zip(values, best, strict=True)
        )
        method = told["methods"][name]
        lines.append(f"| {method['title']} | {method['bits']} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, compare, print the table; 2 for what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), choices=MODELS)
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--count", type=int, default=32, help="pictures of each model (default 32)")
    add("--samples", type=int, default=16, help="calibration pictures of zoo/calibration.txt (default 16)")
    add("--work", type=Path, required=True, help="folder for pictures and checkpoints")
    add("--json", type=Path)
    options = parser.parse_args(argv)
    try:
        print(table(compare(options)))
    except EngineError as error:
        print(f"rivals: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
