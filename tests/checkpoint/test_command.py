"""`python -m engine.convert` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint.layouts import detect
from engine.commands.convert import main
from tests.checkpoint.test_layouts import FLUX


def test_help_teaches_without_loading_torch():
    code = "import sys; from engine.commands.convert import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "svdq-int4_r32-flux.1-dev.safetensors" in done.stdout
    assert "nunchaku_lite" in done.stdout


def test_it_converts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(FLUX), str(tmp_path / "flux"), "--to", "canonical"]) == 0
    assert "written as canonical" in capsys.readouterr().err
    assert detect(tmp_path / "flux").kind == "canonical"


@pytest.mark.parametrize(
    ("target", "to", "sentence"),
    [
        ("lite.safetensors", "nunchaku_lite", "nunchaku_lite is a folder"),
        (str(FLUX), "canonical", "is the source itself"),
    ],
)
def test_targets_that_do_not_suit(
    target: str, to: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(FLUX), str(tmp_path / target), "--to", to]) == 1
    assert sentence in capsys.readouterr().err


def test_a_missing_source_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path / "none.safetensors"), str(tmp_path / "x"), "--to", "canonical"]) == 1
    assert "no such file or folder" in capsys.readouterr().err
