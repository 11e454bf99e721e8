"""The quantizer's benches at their smallest size: they run the real quantizer and their figures hold together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import quantize_full, quantize_outliers, rivals
from bench.evaluation import cases, methods
from bench.quantize_model import TINY, write_model
from engine.errors import ArgumentError
from engine.models.catalogue import ModelSpec
from engine.quantize.rounding import round_int4
from engine.quantize.source import Weights


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_random_model_has_outliers_and_is_the_same_again(tmp_path: Path):
    for name in ("a", "b"):
        write_model(tmp_path / name, TINY, torch.device("cpu"), outliers=4, size=20.0)
    first, second = (Weights(tmp_path / name / "transformer") for name in ("a", "b"))
    assert first.fingerprint() == second.fingerprint()
    name = "single_transformer_blocks.0.proj_mlp.weight"
    sizes = first.read([name], torch.device("cpu"))[name].float().norm(dim=1)
    assert int((sizes > 10 * sizes.median()).sum()) == 4


def test_a_full_run_tells_both_runs(tmp_path: Path):
    out = tmp_path / "told.json"
    quantize_full.main(["--tiny", "--blocks", "1", "1", "--device", "cpu", "--rank", "16", "--json", str(out)])
    told = json.loads(out.read_text())
    assert [run["run"] for run in told["runs"]] == ["data-free", "data"]
    for run in told["runs"]:
        assert sum(run["stages"].values()) == pytest.approx(run["seconds"], abs=1.0)
        assert 0 < run["mean_error_w4a8"] <= run["mean_error_w4a4"] < 0.3
    assert told["runs"][1]["mean_error_w4a4"] < told["runs"][1]["mean_naive_error"]


def test_outliers_cost_rounding_to_nearest_more():
    plain, planted = (quantize_outliers.errors(size, 0) for size in (1, 100))
    assert planted["32"] / plain["32"] < planted["nearest"] / plain["nearest"]


@pytest.mark.parametrize("model", cases.MODELS)
def test_each_model_of_the_zoo_has_cases(model: str):
    found = cases.requests(model, 2)
    assert [request.seed for request in found] == [1000, 1001]
    assert bool(found[0].inputs) == (model not in ("tiny", "tiny-sana"))


def test_the_nearest_checkpoint_rounds_to_the_nearest():
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    assert not methods.METHODS["naive"].recipe.search
    codes, scales, rounded = round_int4(weight, torch.ones(128), torch.float32, search=False)
    assert int(codes.abs().max()) == 7
    assert float(((weight - rounded).unflatten(1, (-1, 64)).abs().amax(-1) / scales).max()) <= 0.5001


def test_pictures_of_other_weights_are_not_taken_again(tmp_path: Path):
    for name in ("first", "second"):
        write_model(tmp_path / name, TINY, torch.device("cpu"), outliers=4, size=20.0 if name == "first" else 30.0)
    first, second = (ModelSpec("mine", "Mine", "flux", "FluxPipeline", str(tmp_path / n)) for n in ("first", "second"))
    for _ in range(2):
        methods.claim(tmp_path / "work", first, 16)
    for spec, samples in ((second, 16), (first, 8)):
        with pytest.raises(ArgumentError, match="holds pictures of other weights or samples of mine"):
            methods.claim(tmp_path / "work", spec, samples)


def test_the_table_marks_the_best():
    told = {
        "methods": {name: {"title": name, "bits": "W4A4"} for name in ("a", "b")},
        "psnr": {"a": {"tiny": {"mean": 30.0}}, "b": {"tiny": {"mean": 35.0}}},
    }
    lines = rivals.table(told).splitlines()
    assert lines[2] == "| a | W4A4 | 30.0 | 30.0 |"
    assert lines[3] == "| b | W4A4 | **35.0** | **35.0** |"
