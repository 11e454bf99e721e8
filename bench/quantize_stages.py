"""What each stage of the quantizer gains on the models of the zoo: layers, and pictures beside BF16.

    python bench/quantize_stages.py --work runs/stages --json bench/results/quantize-stages.json
    python bench/quantize_stages.py --work runs/stages --count 0    # layers alone

Stages are added one after the other; the default without smoothing, without data, and NVFP4 are rows apart. Layer
errors are means of ||y - y_hat|| / ||y|| on rows of the calibration prompts; PSNR in dB is that of held-out pictures
(bench/evaluation/cases.py), with the standard error of the difference to the row before, picture by picture. The model
is calibrated once for all rows. Checkpoints and pictures stay in --work, and a run that was ended goes on from them:
give new weights a new folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.cases import MODELS, requests
from bench.evaluation.machine import machine, write_json, write_text
from bench.evaluation.methods import calibration_prompts, claim, open_checkpoint_engine
from bench.rivals import distances, paint
from engine import Engine
from engine.checkpoint.files import replacing
from engine.checkpoint.linears import GROUPS
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.writer import FileWriter
from engine.errors import EngineError
from engine.models.catalogue import CATALOGUE, ModelSpec, resolve
from engine.quantize import Recipe
from engine.quantize.block import quantize_block
from engine.quantize.calibrate import check_prompts, collect
from engine.quantize.inputs import Inputs
from engine.quantize.records import FILE_NAME, read_records, write_records
from engine.quantize.streamed import StreamedModel


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table: a recipe, and the row it is compared with ("" for none)."""

    title: str
    recipe: Recipe
    beside: str
    data: bool = True


_NEAREST = Recipe(rank=0, alphas=(), rounds=1, gptq=False, search=False, shift=False)
_SMOOTH = dataclasses.replace(_NEAREST, search=True, alphas=Recipe.alphas)
_REFINED = dataclasses.replace(_SMOOTH, rank=Recipe.rank, rounds=Recipe.rounds)
STAGES: dict[str, Stage] = {
    "nearest": Stage("rounding to nearest", _NEAREST, ""),
    "search": Stage("+ search for scales", dataclasses.replace(_NEAREST, search=True), "nearest"),
    "smooth": Stage("+ smoothing", _SMOOTH, "search"),
    "low-rank": Stage("+ low-rank branch (32)", dataclasses.replace(_SMOOTH, rank=Recipe.rank), "smooth"),
    "refined": Stage("+ refinement (8 rounds)", _REFINED, "low-rank"),
    "gptq": Stage("+ GPTQ", dataclasses.replace(_REFINED, gptq=True), "refined"),
    "shift": Stage("+ activation shift (the default)", Recipe(), "gptq"),
    "no-smooth": Stage("the default without smoothing", Recipe(alphas=()), "shift"),
    "data-free": Stage("the default without data", Recipe(gptq=False), "shift", data=False),
    "nvfp4-six": Stage("NVFP4, every group up to 6", Recipe(precision="nvfp4", gptq=False, four_over_six=False), ""),
    "nvfp4": Stage("NVFP4, four over six", Recipe(precision="nvfp4", gptq=False), "nvfp4-six"),
}  # fmt: skip
ACTIVATIONS = ("w4a4", "w4a8")
Seen = Mapping[str, Mapping[Any, Inputs]]


class Base:
    """A 16-bit model that is quantized in every way; it paints its calibration pictures once, when first asked."""

    def __init__(self, spec: ModelSpec, samples: int) -> None:
        self.spec, self.samples = spec, samples
        self._seen: Seen | None = None

    def checkpoint(self, name: str, stage: Stage, path: Path) -> Path:
        """The checkpoint of a stage at `path`, made if it is not there."""
        if path.is_dir():
            return path
        streamed, recipe = StreamedModel(self.spec, torch.device("cpu")), stage.recipe
        details = Quantization(
            streamed.leaves.MODEL_CLASS,
            streamed.config,
            recipe.precision,
            GROUPS[recipe.precision],
            recipe.rank,
            gelu_shift=recipe.shift,
        )
        records = []
        with replacing(path) as folder:
            for block in streamed.blocks:
                print(f"{self.spec.name} {name}: {block}", file=sys.stderr, flush=True)
                groups, seen = streamed.groups[block], self.seen()[block] if stage.data else {}
                tensors, found = quantize_block(streamed, block, groups, seen, recipe, lambda _: None)
                _write(folder / f"{block}.safetensors", tensors, details)
                records += found
            _write(folder / "rest.safetensors", streamed.rest(), details)
            write_records(folder / FILE_NAME, records)
        return path

    def seen(self) -> Seen:
        """What each group of linears reads while calibration prompts are painted, in float32."""
        if self._seen is None:
            streamed = StreamedModel(self.spec, torch.device("cpu"))
            wanted = check_prompts(self.spec, calibration_prompts(self.samples))
            found = collect(streamed, self.spec, wanted, torch.device("cpu"), lambda *_: None)
            self._seen = {
                block: {group: Inputs(read.rows.float(), read.largest) for group, read in groups.items()}  # pyright: ignore[reportOptionalMemberAccess]
                for block, groups in found
            }
        return self._seen


def _write(path: Path, tensors: Mapping[str, torch.Tensor], details: Quantization) -> None:
    with FileWriter(path, len(tensors), metadata=details.metadata()) as out:
        for name in sorted(tensors):
            out.add(name, tensors[name])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All stages of all models; the figures so far are written after each row."""
    told: dict[str, Any] = {"machine": machine(torch.device("cpu")), "pictures": options.count,
                            "calibration_pictures": options.samples, "rows": []}  # fmt: skip
    bases: dict[str, Base] = {}
    for model in options.models:
        spec = resolve(model)
        claim(options.work, spec, options.samples)
        plain = next(row for row in CATALOGUE.values() if row.source == spec.source and not (row.lora or row.runner))
        base = bases.setdefault(plain.name, Base(plain, options.samples))
        rows: dict[str, dict[str, Any]] = {}
        for name in options.stages:
            stage = STAGES[name]
            path = base.checkpoint(name, stage, options.work / "checkpoints" / f"{plain.name}-{name}")
            rows[name] = {"model": model, "stage": name, "title": stage.title, "beside": stage.beside, **_errors(path)}
            if options.count:
                rows[name]["psnr"] = _pictures(spec, stage, path, options.work / model, name, options.count)
            told["rows"].append(rows[name])
            if options.json:
                write_json(options.json, told)
    return told


def _errors(path: Path) -> dict[str, float | None]:
    """Mean errors of the layers with 4-bit activations, with 4- and 8-bit ones."""
    records = [record for record in read_records(path / FILE_NAME) if record.kind == "svdq"]
    data = all(record.naive_error is not None for record in records)
    values = {field: [getattr(record, field) for record in records] for field in ("error_w4a4", "error_w4a8")}
    return {field: round(fmean(found), 5) if data else None for field, found in values.items()}


def _pictures(spec: ModelSpec, stage: Stage, path: Path, work: Path, name: str, count: int) -> dict[str, list[float]]:
    """PSNR of each held-out picture, by activations."""
    wanted, found = requests(spec.name, count), {}
    exact = paint(partial(Engine.load, spec, "bf16", device="cpu"), wanted, work / "bf16")
    for activation in ACTIVATIONS:
        folder = work / f"{name}-{activation}"
        load = partial(open_checkpoint_engine, spec, path, stage.recipe.precision, activation, exact)
        exact = paint(load, wanted, folder) or exact
        found[activation] = [round(value, 3) for value in distances(folder, work / "bf16", count)]
    return found


def table(told: Mapping[str, Any]) -> str:
    """A Markdown table for each model."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in told["rows"]):
        rows = {row["stage"]: row for row in told["rows"] if row["model"] == model}
        lines += ["", f"**{model}**", "", f"| | {' | '.join(_HEADS)} |", "|---" * (len(_HEADS) + 1) + "|"]
        lines += [f"| {row['title']} | {' | '.join(_cells(row, rows.get(row['beside'])))} |" for row in rows.values()]
    return "\n".join(lines[1:]) + "\n"


_HEADS = ("layers W4A4", "layers W4A8", "PSNR W4A4", "gain", "PSNR W4A8", "gain")


def _cells(row: Mapping[str, Any], beside: Mapping[str, Any] | None) -> list[str]:
    cells = ["" if row[field] is None else f"{row[field]:.4f}" for field in ("error_w4a4", "error_w4a8")]
    for activation in ACTIVATIONS:
        if "psnr" not in row:
            return [*cells, "", "", "", ""]
        values = row["psnr"][activation]
        cells += [f"{fmean(values):.1f}", _gain(values, beside["psnr"][activation]) if beside else ""]
    return cells


def _gain(values: Sequence[float], before: Sequence[float]) -> str:
    """Mean difference, and its standard error where there are pictures enough for one."""
    apart = [new - old for new, old in zip(values, before, strict=True)]
    spread = f" ({stdev(apart) / len(apart) ** 0.5:.1f})" if len(apart) > 1 else ""
    return f"{fmean(apart):+.1f}{spread}"


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure, print the table; 2 for what cannot be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["tiny", "tiny-sana"], choices=MODELS, help="default tiny tiny-sana")
    add("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    add("--count", type=int, default=16, help="pictures of each row, 0 for none (default 16)")
    add("--samples", type=int, default=16, help="calibration pictures of zoo/calibration.txt (default 16)")
    add("--work", type=Path, required=True, help="folder for pictures and checkpoints")
    add("--json", type=Path, help="write the figures there, and the table beside it as .md")
    options = parser.parse_args(argv)
    try:
        text = table(measure(options))
    except EngineError as error:
        print(f"quantize_stages: {error}", file=sys.stderr)
        return 2
    print(text)
    if options.json:
        write_text(options.json.with_suffix(".md"), text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
