"""A whole training run at its smallest: every stage takes a few steps, and FluxPipeline opens what comes out."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch

from zoo.train import bundle, flux_tiny, log, samples

SMOKE = Path(flux_tiny.__file__).parents[1] / "configs" / "smoke.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    flux_tiny.main(["--config", str(SMOKE), "--out", str(out), "--minutes", "5", "--max-steps", "3", "--workers", "1"])
    return out


def test_every_stage_left_its_line(run):
    rows = log.read(run / "logs" / "log.jsonl")
    assert {"start", "render", "vae", "encode", "read", "flow", "distill", "samples", "done"} <= {
        row["stage"] for row in rows
    }
    losses = [row["loss"] for row in rows if "loss" in row]
    assert {row["stage"] for row in rows if "loss" in row} == {"vae", "read", "flow", "distill"}
    assert all(0 <= loss < 40 for loss in losses)  # the largest is a sum over 32 kinds of object
    assert {p.name for p in (run / "samples").iterdir()} == {"vae.jpg", "base_02.jpg", "steps_01.jpg", "steps_02.jpg"}
    assert (run / "logs" / "curves.png").stat().st_size > 1000


def test_the_pipeline_opens_the_folder_and_paints(run):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(run / "model", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.config.shift_factor is not None
    kind = {"steps": 2, "guidance": 3.5, "size": 64, "length": 64}
    alone = samples.paint(pipe, ["a red cube"], **kind)
    assert alone.shape == (1, 3, 64, 64)
    assert torch.equal(alone, samples.paint(pipe, ["a red cube"], **kind))


def test_a_run_resumes_from_its_folder(run, tmp_path):
    argv = ["--config", str(SMOKE), "--out", str(tmp_path), "--resume", str(run / "model"), "--minutes", "5"]
    flux_tiny.main([*argv, "--max-steps", "2", "--minutes-distill", "0", "--seed", "1", "--workers", "1"])
    stages = [row["stage"] for row in log.read(tmp_path / "logs" / "log.jsonl") if "loss" in row]
    assert stages == ["read", "flow"]
    old, new = (json.loads((folder / "model/vae/config.json").read_text()) for folder in (run, tmp_path))
    assert old["scaling_factor"] == new["scaling_factor"]


def test_a_bundle_comes_back_whole(run, tmp_path):
    parts = bundle.bundle(run, tmp_path / "parts", max_mib=0.5)
    assert len(parts) > 1
    assert max(p.stat().st_size for p in parts) <= 512 * 1024
    bundle.unbundle(tmp_path / "parts", tmp_path / "back")
    files = [str(path) for path in bundle.members(run)]
    assert filecmp.cmpfiles(run, tmp_path / "back", files, shallow=False) == (files, [], [])


def test_a_bundle_that_cannot_hold_the_model_says_so(run, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        bundle.bundle(run, tmp_path, max_mib=0.1, parts=2)
    parts = bundle.bundle(run, tmp_path, max_mib=0.5)
    parts[0].unlink()
    with pytest.raises(ValueError, match="gap"):
        bundle.unbundle(tmp_path, tmp_path / "back")


def test_configuration_changes_must_name_something_there_is():
    assert flux_tiny.read_config(SMOKE, ["flow.batch=8"])["flow"]["batch"] == 8
    with pytest.raises(ValueError, match=r"flow\.bach"):
        flux_tiny.read_config(SMOKE, ["flow.bach=8"])
