"""bench/latency.py on the small model: what it times, in which order, and what it writes."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import latency
from bench.evaluation.memory import peak_of
from bench.evaluation.variants import Variant, check, load, parse
from engine import ArgumentError, BackendError, Engine
from engine.models.catalogue import resolve

ARGUMENTS = ["--device", "cpu", "--warmup", "1", "--repeats", "3", "--steps", "2", "--size", "128"]


@pytest.fixture(scope="module")
def bf16() -> Engine:
    return Engine.load("tiny", "bf16", device="cpu")


def test_two_precisions_are_timed_and_told(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    names = ["bf16", "int4", f"mine={checkpoint}@w4a4"]
    assert latency.main([*ARGUMENTS, "--precisions", *names, "--out", str(tmp_path / "tiny")]) == 0
    told = json.loads((tmp_path / "tiny.json").read_text())
    rows = {(row["precision"], row["mode"]): row for row in told["rows"]}
    assert set(rows) == {(name, mode) for name in ("bf16", "int4", "mine") for mode in ("end2end", "step")}
    for row in rows.values():
        assert len(row["times"]) == 3
        assert 0 < row["best"] <= row["p10"] <= row["p50"] <= row["p90"] <= row["p99"] <= row["worst"]
        assert row["peak_bytes"] >= row["weight_bytes"] > 2**20
        assert row["error"] == ""
    whole, part = rows["int4", "end2end"], rows["int4", "step"]
    assert part["p50"] < whole["p50"]  # a picture of two steps takes longer than a step
    assert set(whole["median_stages"]) == {"encode", "denoise", "decode"}
    assert whole["weight_bytes"] < 0.5 * rows["bf16", "end2end"]["weight_bytes"]
    assert rows["mine", "step"]["activation"] == "w4a4"
    assert told["machine"]["versions"]["torch"] == torch.__version__
    assert told["settings"]["steps"] == 2
    text = (tmp_path / "tiny.md").read_text()
    assert text == capsys.readouterr().out.rstrip("\n") + "\n"
    assert text.count("| tiny | ") == 6
    with Image.open(tmp_path / "tiny.png") as drawn:
        assert drawn.width > 600


def test_alone_holds_one_at_a_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    together = []
    real = latency.measure_together
    monkeypatch.setattr(latency, "measure_together", lambda *a: together.append(len(a[1])) or real(*a))
    assert latency.main([*ARGUMENTS, "--mode", "step", "--alone", "--precisions", "bf16", "int4"]) == 0
    assert together == [1, 1]
    assert "timed one after the other" in capsys.readouterr().out


def test_precisions_take_turns_after_warming_up(bf16: Engine):
    order: list[str] = []

    def make(name: str):
        return lambda: lambda: order.append(name) or {}

    rows = {name: latency.Row("tiny", name, "step") for name in "ab"}
    latency.take_turns(
        {name: make(name) for name in "ab"}, rows, dict.fromkeys("ab", bf16), Namespace(warmup=2, repeats=3)
    )
    assert "".join(order) == "aaa" + "bbb" + "ababab"  # two to warm up and one for memory, then turns
    assert [len(row.times) for row in rows.values()] == [3, 3]


def test_one_that_fails_leaves_the_turns_and_is_told(bf16: Engine, tmp_path: Path):
    def bad():
        raise RuntimeError("out of | memory\nat last")

    rows = {name: latency.Row("tiny", name, "step") for name in "ab"}
    makers = {"a": lambda: bad, "b": lambda: dict}
    latency.take_turns(makers, rows, dict.fromkeys("ab", bf16), Namespace(warmup=1, repeats=2))
    assert rows["a"].times == []
    assert rows["a"].error == "RuntimeError: out of / memory at last"
    assert len(rows["b"].times) == 2


def test_a_missing_rival_costs_only_its_own_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert latency.main([*ARGUMENTS, "--mode", "step", "--precisions", "nf4", "int4"]) == 1
    told = capsys.readouterr().out
    assert "| nf4 | failed: BackendError: bitsandbytes is needed" in told
    assert "| int4 | " in told


def test_a_step_runs_on_what_the_pipeline_gives(bf16: Engine):
    options = Namespace(prompt="a red cube", seed=0, steps=None, guidance=None, size=128)
    seen = []
    hook = bf16.pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    latency.step(bf16, options)()
    hook.remove()
    first, again = seen[0], seen[-1]
    assert len(seen) >= 2
    assert first["hidden_states"].shape[1] == (128 // 16) ** 2
    assert torch.equal(seen[-2]["hidden_states"], again["hidden_states"])


def test_summaries_are_those_of_the_times():
    row = latency.Row("m", "p", "step", times=[float(v) for v in (5, 1, 2, 3, 4, 6, 7, 8, 9, 100)])
    found = latency.summary(row)
    assert found["p50"] == 5.5
    assert found["best"] == 1
    assert found["trimmed_mean"] == pytest.approx(sum(range(2, 10)) / 8)  # without the least and the most
    assert latency.summary(latency.Row("m", "p", "step")) == {}


def test_sixteen_bit_weights_are_shared_between_eager_and_compiled(bf16: Engine):
    other = load(Variant("again", "bf16"), bf16.spec, "cpu", bf16)
    mine, theirs = (dict(engine.pipe.transformer.named_parameters()) for engine in (bf16, other))
    assert other.pipe.transformer is not bf16.pipe.transformer
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)


def test_peak_counts_what_a_call_adds():
    module = torch.nn.Linear(512, 512)
    held = 4 * (512 * 512 + 512)
    quiet = peak_of(lambda: None, torch.device("cpu"), [module])
    loud = peak_of(lambda: torch.ones(2**25).sum(), torch.device("cpu"), [module])
    assert quiet >= held
    assert loud >= held + 100 * 2**20


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("bf16", Variant("bf16", "bf16")),
        ("int4@w4a4", Variant("int4@w4a4", "int4", "w4a4")),
        ("bf16+compiled", Variant("bf16+compiled", "bf16", compiled=True)),
    ],
)
def test_names_of_precisions(text: str, wanted: Variant):
    assert parse(text) == wanted


def test_a_label_names_a_checkpoint(checkpoint: Path):
    found = parse(f"mine={checkpoint}@w4a8")
    assert (found.label, found.kind, found.activation, found.checkpoint) == ("mine", "int4", "w4a8", str(checkpoint))


@pytest.mark.parametrize("text", ["int4@w8a8", "bf16+fast", "", "@w4a4", "x=no-such-folder", "a b=c"])
def test_names_that_mean_nothing_are_refused(text: str):
    with pytest.raises(ArgumentError, match="precision: "):
        parse(text)


def test_what_cannot_be_loaded_is_told_before_work(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ArgumentError, match="got 'int3'"):
        check(parse("int3"), resolve("tiny"))
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(BackendError, match="pip install torchao"):
        check(parse("int4wo"), resolve("tiny"))
    assert latency.main(["--model", "tiny", "--size", "100"]) == 2
