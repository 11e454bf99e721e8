"""How long it takes to quantize a full-size FLUX.1-dev, and how much memory, with nothing to download.

    python bench/quantize_full.py --json bench/results/quantize-full.json       one GPU, 64 GB of disk
    python bench/quantize_full.py --blocks 2 4 --runs data --samples 16         for trials
    python bench/quantize_full.py --tiny                                        a CPU, seconds

Writes a model of random BF16 weights with planted outliers (bench/quantize_model.py), then takes it through the code of
`python -m engine.quantize`, without data and with calibration pictures, and prints a line of JSON a run: seconds in
all and by stage, peak GiB of the device (torch.cuda.max_memory_allocated) and of the process, mean errors of the
layers. Text embeddings are random numbers of the right shape, since there are no text encoders; every other part of
calibration is the real one. On a GPU, kernels are loaded on a model of two blocks first, in seconds told apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from bench.load_time import Peak
from bench.quantize_model import CONFIG, TINY, write_model
from engine.models import run_flux
from engine.quantize import Recipe, quantize_model
from engine.quantize.records import LayerRecord

GIB = 2**30


class Stages:
    """Seconds of each stage, from what `quantize_model` tells of its progress; shows it once in ten seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = self._shown = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        # What passes before a stage is first heard of is the end of the one before, or the start of this one.
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        if now - self._shown > 10:
            self._shown = now
            print(f"  {stage} {100 * done / total:.0f} %", file=sys.stderr, flush=True)


def random_words(config: Mapping[str, Any], length: int) -> Any:
    """Stands in for the text encoders: random embeddings, others for each seed."""

    def encode(pipe: Any, spec: Any, request: Any, device: torch.device) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(request.seed)
        words = torch.randn(1, length, config["joint_attention_dim"], generator=draw)
        pooled = torch.randn(1, config["pooled_projection_dim"], generator=draw)
        return {
            "prompt_embeds": words.to(device, torch.bfloat16),
            "pooled_prompt_embeds": pooled.to(device, torch.bfloat16),
        }

    return encode


def run(model: Path, samples: int, options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, Any]:
    """Quantize once; the checkpoint is looked at and deleted."""
    out, stages = model.with_name(f"{model.name}-int4"), Stages()
    cuda = options.device.startswith("cuda")
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with patch.object(run_flux, "encode", random_words(config, options.words)), Peak() as peak:
        began = time.perf_counter()
        records = quantize_model(
            str(model),
            out,
            prompts=[f"calibration picture {number}" for number in range(samples)],
            size=options.size,
            steps=options.steps,
            recipe=Recipe(rank=options.rank),
            device=options.device,
            progress=stages,
        )
        seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in out.iterdir())
    shutil.rmtree(out)
    return {
        "run": "data" if samples else "data-free",
        "samples": samples,
        "seconds": round(seconds, 1),
        "stages": {name: round(value, 1) for name, value in stages.seconds.items()},
        "device_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if cuda else None,
        "host_peak_gib": round(peak.most / GIB, 2),
        "checkpoint_gib": round(size / GIB, 3),
        **_errors(records),
    }


def _errors(records: list[LayerRecord]) -> dict[str, Any]:
    found = [record for record in records if record.kind == "svdq"]
    told: dict[str, Any] = {"layers": len(found)}
    for name in ("error_w4a4", "error_w4a8", "naive_error"):
        values = [value for record in found if (value := getattr(record, name)) is not None]
        told[f"mean_{name}"] = round(sum(values) / len(values), 4) if values else None
    return told


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the model if it is not there, then take it through every run asked for."""
    blocks = dict(zip(("num_layers", "num_single_layers"), options.blocks or (), strict=False))
    config = (TINY if options.tiny else CONFIG) | blocks
    model, device = folder / "flux-random", torch.device(options.device)
    told: dict[str, Any] = {"machine": machine(device)}
    if not (model / "model_index.json").is_file():
        began = time.perf_counter()
        told["parameters"] = write_model(model, config, device)
        told["writing_the_model_s"] = round(time.perf_counter() - began, 1)
    told |= {name: getattr(options, name) for name in ("size", "steps", "rank", "words")}
    told |= {"blocks": [config["num_layers"], config["num_single_layers"]], "embeddings": "random", "runs": []}
    if device.type == "cuda":
        told["warm_up_s"] = _warm_up(folder, options, config)
    for name in options.runs:
        told["runs"].append(run(model, options.samples if name == "data" else 0, options, config))
        print(json.dumps(told["runs"][-1]), flush=True)
        if options.json:
            write_json(options.json, told)
    return told


def _warm_up(folder: Path, options: argparse.Namespace, config: dict[str, Any]) -> float:
    """Two blocks at full width, so that loading and choosing kernels is not counted as quantizing."""
    began = time.perf_counter()
    small = folder / "flux-warm-up"
    shutil.rmtree(small, ignore_errors=True)
    less = config | {"num_layers": 1, "num_single_layers": 1}
    write_model(small, less, torch.device(options.device))
    run(small, 2, options, less)
    shutil.rmtree(small)
    return round(time.perf_counter() - began, 1)


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--folder", type=Path, help="where to keep the model; used again when it is there (default a temporary one)")
    add("--runs", nargs="+", default=["free", "data"], choices=("free", "data"))
    add("--samples", type=int, default=128, help="calibration pictures")
    add("--size", type=int, default=1024, help="pixels of a side")
    add("--steps", type=int, default=4, help="of each calibration picture")
    add("--words", type=int, default=512, help="text tokens")
    add("--rank", type=int, default=32)
    add("--blocks", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="fewer blocks, for trials")
    add("--tiny", action="store_true", help="two heads, three blocks, four pictures of 256 pixels")
    add("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(argv)
    if options.tiny:
        options.samples, options.size, options.steps, options.words = 4, 256, 2, 16
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
        measure(options.folder, options)
        return
    with tempfile.TemporaryDirectory(prefix="quantize-full-") as folder:
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
