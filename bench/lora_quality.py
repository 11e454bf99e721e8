"""How near the 4-bit model with a LoRA is to the 16-bit model with the same LoRA through PEFT, on the zoo's LoRAs.

    python bench/lora_quality.py --json bench/results/lora-quality.json
    python bench/lora_quality.py --models tiny-canny --count 2

The 16-bit pictures are diffusers' own: `load_lora_weights` puts the LoRA on, PEFT runs it. Ours come from the INT4
checkpoint that ships, with the LoRA's ranks beside the layers' own. Held-out cases with one seed each, the same in both
(bench/evaluation/cases.py); PSNR in dB of each picture. A sketch's strength is its alpha, in both.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.cases import requests
from bench.evaluation.machine import machine, write_json
from engine import Engine
from engine.errors import EngineError
from engine.metrics import psnr
from engine.models import sketch
from engine.models.catalogue import CATALOGUE, ModelSpec, resolve
from engine.request import Request

LORAS = tuple(spec.name for spec in CATALOGUE.values() if spec.ships and spec.lora)
ACTIVATIONS = ("w4a8", "w4a4")
GOAL = 24.0  # dB


def paint_by_peft(spec: ModelSpec, wanted: list[Request]) -> list[Image.Image]:
    """The pictures of the 16-bit model whose LoRA diffusers and PEFT put on, as they do for anybody."""
    engine = Engine.load(replace(spec, lora=""), "bf16", device="cpu")
    lora = Path(spec.lora)
    engine.pipe.load_lora_weights(str(lora.parent), weight_name=lora.name)
    if spec.runner != "sketch":
        return [engine.run(request).image for request in wanted]
    # The runner of sketches sets the strength of the engine's own LoRAs; the sampler apart from it takes PEFT's.
    return [
        sketch.sketch_to_image(
            engine.pipe, request.inputs["sketch"], request.prompt, max_sequence_length=spec.max_sequence_length,
            generator=torch.Generator().manual_seed(request.seed),
        )[0]
        for request in wanted
    ]  # fmt: skip


def measure(name: str, count: int) -> dict[str, Any]:
    """Mean and worst PSNR of one LoRA with 8-bit and with 4-bit activations."""
    spec, wanted = resolve(name), requests(name, count)
    exact = paint_by_peft(spec, wanted)
    told: dict[str, Any] = {}
    for activation in ACTIVATIONS:
        engine = Engine.load(spec, "int4", device="cpu", activation=activation)
        values = [psnr(first, engine.run(request).image) for first, request in zip(exact, wanted, strict=True)]
        told[activation] = {
            "mean": round(fmean(values), 2), "worst": round(min(values), 2), "backend": engine.backend,
            "pictures_below_goal": sum(value < GOAL for value in values),
        }  # fmt: skip
        print(f"{name} {activation}: {told[activation]['mean']} dB, worst {told[activation]['worst']}", flush=True)
    return told


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table: mean (worst)."""
    lines = [f"| LoRA | {' | '.join(name.upper() for name in ACTIVATIONS)} |", "|---" * (len(ACTIVATIONS) + 1) + "|"]
    for name, row in found.items():
        cells = (f"{row[kind]['mean']:.1f} ({row[kind]['worst']:.1f})" for kind in ACTIVATIONS)
        lines.append(f"| {name.removeprefix('tiny-')} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table; 2 for what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(LORAS), choices=LORAS)
    add("--count", type=int, default=8, help="pictures of each LoRA (default 8)")
    add("--json", type=Path)
    options = parser.parse_args(argv)
    if options.count < 1:
        parser.error(f"--count: expected 1 or more, got {options.count}")
    about = machine(torch.device("cpu"))
    found: dict[str, dict[str, Any]] = {}
    try:
        for name in options.models:
            found[name] = measure(name, options.count)
            if options.json:
                write_json(options.json, {"machine": about, "pictures": options.count, "goal": GOAL, "psnr": found})
    except EngineError as error:
        print(f"lora_quality: {error}", file=sys.stderr)
        return 2
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
