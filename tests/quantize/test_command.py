"""The command as a user types it: what it says, and what it refuses in one sentence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from engine.checkpoint.layouts import detect
from engine.quantize.__main__ import main
from engine.quantize.progress import Bars
from tests.quantize.conftest import contents

QUICK = ["--no-report", "--rank", "16", "--rounds", "2", "--size", "256", "--steps", "2", "--device", "cpu"]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence with which the command refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("engine.quantize: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("engine.quantize: ")


def test_it_says_how_long_it_takes_and_what_came_out(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "svdq.safetensors"
    assert main([str(model), "--out", str(out), "--calib", str(prompts), "--format", "nunchaku", *QUICK]) == 0
    text, bars = capsys.readouterr()
    assert f"{out}: " in text
    assert "15 groups of linears" in text
    for stage in ("calibrating", "quantizing", "writing"):
        assert re.search(rf"{stage} +100 % .*\d+:\d\d gone, \d+:\d\d left", bars), bars
    assert detect(out).kind == "nunchaku"


def test_calib_none_is_the_same_as_no_calib(model: Path, tmp_path: Path):
    assert main([str(model), "--out", str(tmp_path / "a"), "--calib", "none", *QUICK]) == 0
    assert main([str(model), "--out", str(tmp_path / "b"), *QUICK]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_what_an_earlier_run_did_does_not_count_for_the_time_left(capsys: pytest.CaptureFixture[str]):
    with Bars() as bars:
        bars("quantizing", 90, 100)
        bars("quantizing", 91, 100)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "91 %" in last
    assert "00:00 left" in last or "00:01 left" in last


def test_an_interrupt_says_how_to_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        capsys: pytest.CaptureFixture[str]):  # fmt: skip
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.quantize.quantize_model", stop)
    assert main([str(model), "--out", str(tmp_path / "x")]) == 130
    assert "--resume goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "20"], "--rank: expected a multiple of 16 from 0 up, got 20"),
        (["--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--calib", "nowhere.txt"], r"--calib: expected none or a text file, a prompt a line, got nowhere\.txt \(.*"),
        (["--keep-16bit", "*.no_such"], r"keep: the pattern '\*\.no_such' matches no linear of the model"),
        (["--keep-16bit", "*.norm*", "--format", "nunchaku"], r"keep: nunchaku's layout .*, got \*\.norm\*;.*"),
        (["--precision", "nvfp4", "--format", "nunchaku_lite"], "format: .* for int4 only, got nvfp4; use nunchaku"),
        (["--device", "tpu"], "device: expected auto, cpu or cuda.*, got 'tpu'"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
):
    assert re.fullmatch(sentence, said(capsys, model, "--out", tmp_path / "out", *arguments))
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_none(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty, binary, long = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "long.txt"
    empty.write_text("\n \n")
    binary.write_bytes(b"\xff\xfe\x00")
    long.write_text("a cube " * 1000)
    for file, sentence in (
        (empty, "--calib: expected a prompt a line, but .* holds none"),
        (binary, "--calib: expected none or a text file, .*"),
        (long, "prompt: expected at most 4000 characters, got .*"),
    ):
        assert re.fullmatch(sentence, said(capsys, model, "--out", tmp_path / "out", "--calib", file, *QUICK))


def test_sizes_and_steps_outside_the_models_limits(model: Path, tmp_path: Path, prompts: Path, capsys):
    common = [model, "--out", tmp_path / "out", "--calib", prompts]
    assert said(capsys, *common, "--size", "100").startswith("width: expected a whole number from 256 to 2048")
    assert said(capsys, *common, "--steps", "99").startswith("steps: expected a whole number from 1 to 50")


def test_outputs_that_must_not_be_replaced(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other, file, named = tmp_path / "pictures", tmp_path / "file", tmp_path / "x.safetensors"
    other.mkdir()
    (other / "holiday.jpg").touch()
    file.touch()
    named.mkdir()
    for out, sentence in (
        (model, f"out: {model} is the folder of model itself, or a part of it; choose another name"),
        (model / "transformer", "out: .* is the folder of model itself, or a part of it; choose another name"),
        (model.parent, "out: .* is the folder of model itself, or a part of it; choose another name"),
        (other, r"out: .* holds other things than a checkpoint \(holiday\.jpg\); choose another name"),
        (file, "out: expected a folder to write, or a name ending in .safetensors, got the file .*"),
        (named, "out: expected a file to write for a name ending in .safetensors, got the folder .*"),
    ):
        assert re.fullmatch(sentence, said(capsys, model, "--out", out, *QUICK)), out
    assert said(capsys, model, "--out", tmp_path / "a.safetensors", "--format", "nunchaku_lite").startswith(
        "out: nunchaku_lite is a folder, got the file name a.safetensors"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "file", "x.safetensors"}


def test_models_that_cannot_be_quantized_as_they_are(model: Path, tmp_path: Path, prompts: Path, capsys):
    out = ["--out", tmp_path / "out"]
    assert said(capsys, "tiny-canny", *out).startswith("model: tiny-canny is a LoRA on the model in ")
    assert said(capsys, "nowhere", *out).startswith("model: expected one of ")
    assert "nunchaku_lite holds linears in multiples of 128 only, but transformer_blocks.0." in said(
        capsys, "tiny-sana", *out, "--format", "nunchaku_lite"
    )
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-64])
    assert "not a whole safetensors file" in said(capsys, broken, *out)
