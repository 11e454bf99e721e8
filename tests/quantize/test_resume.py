"""A run that is ended at any moment goes on from there, to the bytes of an undisturbed one."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine import ArgumentError
from engine.checkpoint.layouts import detect
from engine.models.catalogue import zoo_folder
from engine.quantize import quantize_model
from tests.quantize import child
from tests.quantize.conftest import PROMPTS, QUICK, SMALL, contents

CALIBRATION = zoo_folder().parent / "calibration.txt"
PROCESSES = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once, by the process from which others are forked.
PROCESSES.set_forkserver_preload(["diffusers", "transformers", "engine.quantize.run", "engine.models.flux"])

Undisturbed = tuple[dict[str, bytes], int]


class Ended(Exception):
    """Stands for a kill at a place that a test chooses."""


def quantize(model: Path, out: Path, resume: bool = False, stop_at: int | None = None, **changes: object) -> int:
    """Quantize; the `stop_at`th word of progress ends the run. Returns how many words there were."""
    words = 0

    def progress(*_: object) -> None:
        nonlocal words
        if words == stop_at:
            raise Ended
        words += 1

    settings = {"prompts": PROMPTS, "recipe": QUICK, "progress": progress, **SMALL, **changes}
    quantize_model(str(model), out, resume=resume, **settings)  # pyright: ignore
    return words


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "int4"
    words = quantize(model, out)
    return contents(out), words


def test_ended_after_every_step_and_resumed_it_gives_the_same_bytes(
    model: Path, tmp_path: Path, undisturbed: Undisturbed
):
    """One run, ended again and again, a little later each time."""
    wanted, words = undisturbed
    out, ended = tmp_path / "int4", 0
    for stop_at in range(0, words, 3):
        try:
            quantize(model, out, resume=True, stop_at=stop_at)
        except Ended:
            ended += 1
            assert not out.exists()
        else:
            break
    assert ended > 5
    assert contents(out) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]


def test_finished_blocks_are_not_made_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "int4"
    calls = 2 * (2 * 2 + 1)  # two blocks; two pictures of two steps and one step before the first
    with pytest.raises(Ended):
        quantize(model, out, stop_at=calls + 1 + 10 + 1)  # in the second block, whose first one has ten groups
    made = {path.stem for path in (tmp_path / "int4.work" / "blocks").glob("*.safetensors")}
    assert made == {"transformer_blocks.0"}
    assert {path.stem for path in (tmp_path / "int4.work" / "inputs").iterdir()} == {"single_transformer_blocks.0"}
    heard = []
    quantize_model(str(model), out, prompts=PROMPTS, recipe=QUICK, resume=True,
                   progress=lambda *word: heard.append(word), **SMALL)  # pyright: ignore  # fmt: skip
    assert [stage for stage, *_ in heard if stage != "writing"] == ["quantizing"] * 6
    _, done, total = heard[0]
    assert 0 < done < total


def test_a_run_that_failed_before_it_had_anything_leaves_nothing(model: Path, tmp_path: Path):
    with pytest.raises(Ended):
        quantize(model, tmp_path / "int4", stop_at=3)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def half(model: Path, tmp_path: Path) -> Path:
    """The output of a run that was ended with one block finished."""
    out = tmp_path / "int4"
    with pytest.raises(Ended):
        quantize(model, out, stop_at=22)
    return out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"prompts": PROMPTS[:1]}, "calibration pictures: "),
        ({"prompts": ()}, r"calibration pictures: .* then, none now\)"),
        ({"size": 272}, "calibration pictures: "),
        ({"steps": 3}, "calibration pictures: "),
        ({"recipe": replace(QUICK, rank=32)}, r"rank: 16 then, 32 now\)"),
        ({"recipe": replace(QUICK, gptq=False)}, r"gptq: True then, False now\)"),
        ({"keep": ["*.proj_mlp"]}, r"keep: none then, \*\.proj_mlp now\)"),
    ],
)
def test_records_of_other_settings_are_refused(model: Path, half: Path, changes: dict[str, Any], what: str):
    kept = sorted(half.with_name("int4.work").rglob("*"))
    with pytest.raises(ArgumentError, match=f"^resume: .* belongs to another request \\({what}"):
        quantize(model, half, resume=True, **changes)
    assert sorted(half.with_name("int4.work").rglob("*")) == kept


def test_records_of_another_model_are_refused(model: Path, half: Path, tmp_path: Path):
    other = tmp_path / "model"
    shutil.copytree(model, other)
    file = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = "single_transformer_blocks.0.proj_mlp.weight"
    save_file({**tensors, name: tensors[name] * 1.01}, file)
    with pytest.raises(ArgumentError, match=r"belongs to another request \(model: model, "):
        quantize(other, half, resume=True)


def test_finished_work_is_not_thrown_away_unasked(model: Path, half: Path):
    with pytest.raises(ArgumentError, match=r"^out: .*int4\.work holds the finished blocks .* --resume"):
        quantize(model, half)


def test_another_layout_may_be_asked_for_when_a_run_goes_on(model: Path, half: Path):
    quantize(model, half, resume=True, format="nunchaku_lite")
    assert detect(half).kind == "nunchaku_lite"


def test_resume_without_earlier_work_is_an_ordinary_run(model: Path, tmp_path: Path, undisturbed: Undisturbed):
    quantize(model, tmp_path / "int4", resume=True)
    assert contents(tmp_path / "int4") == undisturbed[0]


@pytest.mark.parametrize("harm", ["record", "figures", "inputs"])
def test_a_damaged_record_is_made_again(model: Path, half: Path, undisturbed: Undisturbed, harm: str):
    work = half.with_name("int4.work")
    if harm == "record":
        file = work / "blocks" / "transformer_blocks.0.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "figures":
        (work / "blocks" / "transformer_blocks.0.json").write_text("[")
    else:
        (work / "inputs" / "single_transformer_blocks.0.safetensors").unlink()
    quantize(model, half, resume=True)
    assert contents(half) == undisturbed[0]


def test_two_runs_do_not_write_one_output(model: Path, tmp_path: Path):
    out = tmp_path / "int4"

    def second(*_: object) -> None:
        with pytest.raises(ArgumentError, match=r"^out: another run is at work in .*int4\.work"):
            quantize(model, out, resume=True)
        raise Ended

    with pytest.raises(Ended):
        quantize(model, out, progress=second)


def begin(arguments: list[str]) -> Any:
    process = PROCESSES.Process(target=child.quantize, args=(arguments,))
    process.start()
    return process


def finish(process: Any) -> None:
    process.join()
    assert process.exitcode == 0


def killed_and_resumed(arguments: list[str], moment: float) -> bool:
    """Start, kill -9 after `moment` seconds, resume; returns whether the kill came in time."""
    process = begin(arguments)
    process.join(moment)
    process.kill()
    process.join()
    finish(begin([*arguments, "--resume"]))
    return process.exitcode == -9


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_ten_random_moments(model: Path, tmp_path: Path, prompts: Path):
    """Random in time: each trial is a whole run with one kill."""
    common = [str(model), "--calib", str(prompts), "--size", "256", "--steps", "2", "--rank", "16", "--rounds", "2",
              "--device", "cpu", "--format", "nunchaku", "--no-report"]  # fmt: skip
    seconds = []
    for _ in range(2):  # the first process also waits for the imports
        start = time.monotonic()
        finish(begin([*common, "--out", str(tmp_path / "whole" / "int4.safetensors")]))
        seconds.append(time.monotonic() - start)
    wanted, draw, hits = contents(tmp_path / "whole" / "int4.safetensors"), random.Random(), 0
    for number in range(10):
        out = tmp_path / str(number) / "int4.safetensors"
        moment = draw.uniform(0.0, seconds[1])
        hits += killed_and_resumed([*common, "--out", str(out)], moment)
        assert contents(out) == wanted, moment
        assert {path.name for path in out.parent.iterdir()} == set(wanted), moment
    print(f"{hits} of 10 kills within the {seconds[1]:.1f} s of a run")
    assert hits >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_small_flux_killed_five_times_in_one_run(tmp_path: Path):
    """The model that ships, with calibration: one run, ended five times on its way, each time somewhere else."""
    common = ["tiny", "--calib", str(CALIBRATION), "--samples", "2", "--rounds", "1", "--device", "cpu", "--no-report"]
    start = time.monotonic()
    finish(begin([*common, "--out", str(tmp_path / "whole")]))
    seconds, draw, hits = time.monotonic() - start, random.Random(), 0
    arguments = [*common, "--out", str(tmp_path / "int4"), "--resume"]
    for _ in range(5):
        process = begin(arguments)
        process.join(draw.uniform(0.0, seconds / 3))
        process.kill()
        process.join()
        hits += process.exitcode == -9
    finish(begin(arguments))
    print(f"{hits} of 5 kills within the {seconds:.1f} s of a run")
    assert contents(tmp_path / "int4") == contents(tmp_path / "whole")
