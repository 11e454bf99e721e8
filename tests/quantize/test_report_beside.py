"""The report that each run writes beside its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engine.quantize.__main__ import main

QUICK = ["--rank", "16", "--rounds", "1", "--no-smooth", "--device", "cpu"]


@pytest.fixture
def control(model: Path, tmp_path: Path) -> Path:
    """The model under a pipeline that starts from a picture."""
    folder = tmp_path / "control"
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxControlPipeline"}))
    return folder


def test_a_model_that_starts_from_pictures_is_told_by_its_layers(control: Path, tmp_path: Path, capsys):
    assert main([str(control), "--out", str(tmp_path / "int4"), *QUICK]) == 0
    report = tmp_path / "int4-report"
    assert f"quality report: {report / 'index.html'}" in capsys.readouterr().out
    told = json.loads((report / "report.json").read_text())
    assert told["columns"] == []
    assert len(told["layers"]) == 15
    assert told["layers_source"].startswith("told by the quantizer without data")
    page = (report / "index.html").read_text()
    assert "control starts from pictures, which prompts cannot give: none were painted." in page
    assert "Before and after" not in page


def test_nothing_else_is_replaced_by_a_report(model: Path, tmp_path: Path, capsys):
    (tmp_path / "int4-report").mkdir()
    (tmp_path / "int4-report" / "holiday.jpg").touch()
    assert main([str(model), "--out", str(tmp_path / "int4"), *QUICK]) == 2
    assert "int4-report is there and is no report; choose another folder" in capsys.readouterr().err
    assert not (tmp_path / "int4").exists()


def test_no_report_where_none_is_wanted(model: Path, tmp_path: Path):
    assert main([str(model), "--out", str(tmp_path / "int4"), "--no-report", *QUICK]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4"]
