"""The report of a SANA checkpoint: inputs that are no multiple of 64, and a pipeline that doubles its batch."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.evaluation.variants import Variant, load
from engine import Request
from engine.memory import module_bytes
from engine.models.catalogue import resolve
from engine.quantize.report import write_report
from engine.quantize.report_advice import prepared, put_back
from tests.models.test_sana import PROMPT, folder

sana_folder = folder  # the fixture that builds a random pipeline and its checkpoint


def test_a_sana_report_measures_its_layers(sana_folder: Path, tmp_path: Path):
    report = write_report(
        tmp_path / "r", model=str(sana_folder), checkpoint=f"{sana_folder}-int4", prompts=[PROMPT], steps=1,
        device="cpu", activations=("w4a8", "w4a4"),
    )  # fmt: skip
    by_name = {layer.name: layer for layer in report.layers}
    point = by_name["transformer_blocks.0.ff.conv_point"]
    assert point.shape == (64, 160)
    for layer in report.layers:
        assert 0 < (layer.error_w4a8 or 0) < (layer.error_w4a4 or 0) < (layer.naive_error or 0) * 1.5 < 0.6
    assert len(report.columns) == 3


def test_a_wide_layer_goes_back_to_its_own_width(sana_folder: Path, tmp_path: Path):
    spec = resolve(str(sana_folder))
    exact = load(Variant("bf16", "bf16"), spec, "cpu")
    close = load(Variant("int4", "int4"), spec, "cpu", exact)
    report = write_report(
        tmp_path / "r", model=spec, checkpoint=f"{sana_folder}-int4", prompts=[PROMPT], steps=1, device="cpu"
    )
    before = module_bytes(close.pipe.transformer)
    put_back(close.pipe.transformer, prepared(exact), report.layers, ["transformer_blocks.0.ff.conv_point"])
    linear = close.pipe.transformer.transformer_blocks[0].ff.conv_point
    assert type(linear) is torch.nn.Linear
    assert linear.in_features == 160
    assert module_bytes(close.pipe.transformer) > before
    assert close.run(Request(PROMPT, steps=1)).image.size == exact.run(Request(PROMPT, steps=1)).image.size
