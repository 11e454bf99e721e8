"""The quality report of a 4-bit checkpoint: a page with pictures, and the same figures as JSON.

    python -m engine.quantize.report my-int4 --model tiny --out report

The page stands alone: pictures, styles and the little script it has are in the one file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engine.checkpoint.files import replacing
from engine.errors import ArgumentError, BackendError
from engine.metrics import load_lpips
from engine.models.catalogue import ModelSpec, resolve
from engine.quantize import report_advice as advice
from engine.quantize.calibrate import starts_from_words
from engine.quantize.records import LayerRecord, read_records, records_path
from engine.quantize.report_facts import bytes_of, check_report_place, device_name, quantization_of, source_of, versions
from engine.quantize.report_layers import measure_layers
from engine.quantize.report_pictures import PROMPTS, Column, paint

__all__ = ["PROMPTS", "Report", "write_report"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """All that a report says; `report.json` holds the same.

    `columns` are the painted precisions, the 16-bit reference first; `trial` is the first 4-bit one painted again
    with the suggested layers in 16 bits. Bytes are of the transformer.
    """

    model: str
    precision: str
    activation: str
    rank: int
    keep: list[str]
    device: str
    versions: dict[str, str]
    date: str
    steps: int
    bytes_16bit: int
    bytes_file: int
    layers: list[LayerRecord]
    layers_source: str
    rule: str
    advice: advice.Advice
    columns: list[Column] = field(default_factory=list)
    trial: Column | None = None
    notes: list[str] = field(default_factory=list)


def write_report(
    out: str | Path,
    *,
    model: str | ModelSpec,
    checkpoint: str | Path,
    records: Sequence[LayerRecord] | None = None,
    prompts: Sequence[str] = PROMPTS,
    steps: int | None = None,
    activations: Sequence[str] = ("auto",),
    device: str = "auto",
    lpips: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Paint `prompts` in BF16 and from `checkpoint`, compare, and write index.html, report.json and the pictures.

    `records` are the quantizer's figures of each layer; without them the file beside the checkpoint is read, and
    where there is none every layer is measured on the prompts' own inputs. `steps` is denoising steps (default the
    model's). `activations` are painted a column each ("auto", "w4a8", "w4a4"); the first one decides on suggestions.
    A model that starts from pictures is told by its layers alone. `out` is replaced when all is done, and must not hold
    anything but an earlier report. Raises ArgumentError, CheckpointError, ModelError or BackendError.
    """
    check_report_place(Path(out))
    if not prompts:
        raise ArgumentError("prompts: expected one or more, got none")
    if not activations:
        raise ArgumentError("activations: expected one or more of auto, w4a8, w4a4, got none")
    with replacing(Path(out)) as folder:
        report = _Writer(model, checkpoint, prompts, steps, device, progress).run(folder, records, activations, lpips)
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"
        (folder / "report.json").write_text(text, encoding="utf-8")
        from engine.quantize.report_page import page

        (folder / "index.html").write_text(page(report, folder / "pictures"), encoding="utf-8")
    return report


class _Writer:
    """The run behind `write_report`: what is shared by its stages."""

    def __init__(
        self,
        model: str | ModelSpec,
        checkpoint: str | Path,
        prompts: Sequence[str],
        steps: int | None,
        device: str,
        progress: Progress | None,
    ) -> None:
        self.checkpoint = Path(checkpoint)
        self.about = quantization_of(self.checkpoint)
        known = resolve(model)
        self.precision = "nvfp4" if self.about.group_size == 16 else "int4"
        self.spec = dataclasses.replace(known, checkpoints={**known.checkpoints, self.precision: str(checkpoint)})
        self.prompts, self.steps, self.device = prompts, steps, device
        self.tell = progress or (lambda *_: None)
        self.notes: list[str] = []

    def run(
        self, folder: Path, records: Sequence[LayerRecord] | None, activations: Sequence[str], lpips: bool
    ) -> Report:
        from engine.generate import Engine

        if not starts_from_words(self.spec):
            return self._of_layers(records)
        distance = self._lpips() if lpips else None
        exact = self._exact(Engine)
        bytes_16bit = exact.weight_bytes

        def painted(engine: Any, label: str, reference: Column | None) -> Column:
            where = folder / "pictures"
            return paint(engine, label, self.prompts, self.steps, where, reference, distance, self.tell)

        columns = [painted(exact, "BF16", None)]
        layers, source = self._layers(exact, records)
        advice.prepared(exact).to("cpu")
        first: Any = None
        for activation in dict.fromkeys(activations):
            engine = Engine.load(self.spec, self.precision, device=self.device, activation=activation, share=exact)
            columns.append(painted(engine, f"{self.precision.upper()} {engine.activation.upper()}", columns[0]))
            first = first or engine
        suggested = advice.advise(layers, first.activation, bytes_of(self.checkpoint))
        trial = None
        if suggested.layers:
            advice.put_back(first.pipe.transformer, exact.pipe.transformer, layers, suggested.layers)
            trial = painted(first, f"{columns[1].label} with suggested layers", columns[0])
        return self._report(
            first.activation, first.device, bytes_16bit, layers, source, suggested, columns=columns, trial=trial
        )

    def _of_layers(self, records: Sequence[LayerRecord] | None) -> Report:
        """A report without pictures, from the quantizer's figures."""
        from engine.generate import pick_device
        from engine.linear import resolve_activation
        from engine.quantize.source import Weights, part_folder

        path = records_path(self.checkpoint)
        layers = list(records) if records is not None else read_records(path) if path.is_file() else []
        self.notes.append(f"{self.spec.title} starts from pictures, which prompts cannot give: none were painted.")
        device = pick_device(self.device)
        activation = resolve_activation("auto", device)
        suggested = advice.advise(layers, activation, bytes_of(self.checkpoint))
        size = Weights(part_folder(self.spec, "transformer")).nbytes
        return self._report(activation, device, size, layers, source_of(layers), suggested)

    def _report(
        self,
        activation: str,
        device: Any,
        bytes_16bit: int,
        layers: list[LayerRecord],
        source: str,
        suggested: advice.Advice,
        **pictures: Any,
    ) -> Report:
        return Report(
            model=self.spec.title,
            precision=self.precision,
            activation=activation,
            rank=self.about.rank,
            keep=list(self.about.keep),
            device=device_name(device),
            versions=versions(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            steps=self.steps or int(self.spec.steps.default),
            bytes_16bit=bytes_16bit,
            bytes_file=bytes_of(self.checkpoint),
            layers=layers,
            layers_source=source,
            rule=advice.RULE,
            advice=suggested,
            notes=self.notes,
            **pictures,
        )

    def _exact(self, engine_class: Any) -> Any:
        import torch

        try:
            return engine_class.load(self.spec, "bf16", device=self.device)
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"device: the 16-bit {self.spec.title} does not fit into the GPU's memory; make the report with"
                " --device cpu, or on a larger GPU"
            ) from error

    def _layers(self, exact: Any, records: Sequence[LayerRecord] | None) -> tuple[list[LayerRecord], str]:
        path = records_path(self.checkpoint)
        if records is None and path.is_file():
            records = read_records(path)
        if records is not None:
            names = {group.title: group.names for group in advice.plan(exact)}
            named = [dataclasses.replace(r, names=r.names or names.get(r.name, (r.name,))) for r in records]
            return named, source_of(named)
        found = measure_layers(exact, self.spec, self.precision, self.prompts, self.steps, self.tell)
        return found, "measured on what the layers read while these prompts were painted"

    def _lpips(self) -> Any:
        import torch

        try:
            return load_lpips("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")
        except BackendError as error:
            self.notes.append(f"LPIPS was not measured. {error}")
            return None


if __name__ == "__main__":
    from engine.commands.report import main

    raise SystemExit(main())
