"""The evaluation of the control and fill models: its cases, its figures, and the command from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from zoo import control_cases, evaluate_control
from zoo.probe import Detection, Probe
from zoo.probe.model import Network
from zoo.train import adapt, depth_estimator, dist, fill, lora

WORLD = dist.World(0, 1, torch.device("cpu"))


class Sees:
    """A probe that answers from a list."""

    def __init__(self, answers: list[list[Detection]]) -> None:
        self.answers = answers

    def detect(self, images: torch.Tensor) -> list[list[Detection]]:
        assert images.dtype == torch.uint8
        return self.answers


def thing(shape: str, color: str, x: float, y: float) -> Detection:
    return Detection(shape, color, "small", "matte", x, y, 7.0, 0.9)


@pytest.fixture(scope="module")
def holes_cases() -> control_cases.Cases:
    return control_cases.fill(10, 64, "cpu")


def test_fill_cases_ask_for_the_old_object_another_or_none(holes_cases):
    cases = holes_cases
    assert sorted(set(cases.group)) == ["changed", "removed", "same"]
    hole = cases.hole[:, None].expand_as(cases.given)
    for i, group in enumerate(cases.group):
        assert torch.equal(cases.truth[i][~hole[i]], cases.given[i][~hole[i]])
        assert torch.equal(cases.truth[i], cases.given[i]) == (group == "same")
        named = cases.captions[i].objects
        assert len(named) == 1
        if group == "removed":
            assert not any(shape in cases.prompts[i] for shape in ("cube", "sphere", "cone", "cylinder"))
        else:
            assert cases.prompts[i] == cases.captions[i].text
            assert "floor" not in cases.prompts[i]


def test_cases_are_the_same_each_time(holes_cases):
    again = control_cases.fill(10, 64, "cpu")
    assert again.prompts == holes_cases.prompts
    assert torch.equal(again.hole, holes_cases.hole)
    assert torch.equal(again.given, holes_cases.given)


def test_fill_scores_count_only_what_is_in_the_hole(holes_cases):
    cases, right, beside = holes_cases, [], []
    for i in range(len(cases)):
        inside, outside = (torch.nonzero(m)[0].tolist() for m in (cases.hole[i], ~cases.hole[i]))
        named = cases.captions[i].objects[0]
        at = lambda place: ((place[1] + 0.5) / 64, (place[0] + 0.5) / 64)  # noqa: E731
        wanted = [] if cases.group[i] == "removed" else [thing(named.shape, named.color, *at(inside))]
        right.append(wanted)
        beside.append([thing(named.shape, named.color, *at(outside))])
    painted = torch.zeros_like(cases.given)
    good = control_cases.score_fill(cases, painted, Sees(right))
    assert good["appears"] == good["appears_same"] == good["appears_changed"] == good["emptied"] == 1
    assert good["outside_identical"] == 1
    poor = control_cases.score_fill(cases, painted, Sees(beside))
    assert poor["appears"] == 0
    assert poor["emptied"] == 1
    kept = control_cases.score_fill(cases, cases.given, Sees(right))
    assert kept["outside_psnr"] > good["outside_psnr"]


def test_a_perfect_painter_scores_full_marks_on_edges():
    cases = control_cases.control("canny", 3, 96, "cpu")
    assert control_cases.score_canny(cases, cases.truth)["edge_f1"] == 1
    assert control_cases.score_canny(cases, torch.flip(cases.truth, [2]))["edge_f1"] < 0.5


def test_depth_is_scored_by_rank():
    cases = control_cases.control("depth", 2, 64, "cpu")
    exact = cases.given[:, 0].float()
    assert control_cases.score_depth(cases, cases.truth, lambda _: exact**0.5)["rank_correlation"] > 0.999
    assert control_cases.score_depth(cases, cases.truth, lambda _: -exact)["rank_correlation"] < -0.999


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Path:
    """An untrained probe and an untrained depth estimator."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    Probe(Network()).save(folder / "probe")
    config = json.loads(Path(depth_estimator.CONFIG).with_name("depth_smoke.json").read_text())["model"]
    depth_estimator.build(config).save_pretrained(folder / "depth")
    depth_estimator.save_processor(config["size"], folder / "depth")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["canny", "depth", "fill"])
def test_the_command_scores_a_lora(flux_base, judges, tmp_path, kind):
    torch.manual_seed(1)
    config = json.loads(Path(fill.CONFIG).with_name("fill_smoke.json").read_text())
    channels, start = (384, fill.read_start()) if kind == "fill" else (128, adapt.read_start(128))
    made = adapt.Tuned(flux_base, config, channels, start, WORLD)
    lora.save(made.parts.transformer, tmp_path / "lora")
    evaluate_control.main(["--kind", kind, "--base", str(flux_base), "--lora", str(tmp_path / "lora"), "--out",
                           str(tmp_path / "out"), "--count", "5", "--batch", "3", "--steps", "1", "--size", "64",
                           "--probe", str(judges / "probe"), "--depth", str(judges / "depth"), "--device", "cpu",
                           "--sheet", "2", "--save-pictures"])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["rows"]) == {"bf16", "autoencoder", "renders"}
    assert results["main"] in results["rows"]["bf16"]
    assert (tmp_path / "out" / "sheet-bf16.jpg").is_file()
    assert len(list((tmp_path / "out" / "pictures" / "bf16").iterdir())) == 5
    if kind == "canny":
        assert results["rows"]["renders"]["edge_f1"] == 1


def test_missing_folders_are_named_in_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="--depth"):
        evaluate_control.main(
            ["--kind", "depth", "--out", str(tmp_path), "--count", "1", "--size", "64", "--device", "cpu"]
        )
    with pytest.raises(SystemExit, match="--lora"):
        evaluate_control.main(
            ["--kind", "canny", "--out", str(tmp_path), "--count", "1", "--size", "64", "--device", "cpu"]
        )
