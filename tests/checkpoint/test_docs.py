"""The commands of docs/format.md run as they stand there."""

from __future__ import annotations

import contextlib
import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {"engine.convert": "engine.commands.convert", "engine.lora.convert": "engine.commands.convert_lora"}
BLOCK = re.search(r"```sh\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.S).group(1)


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one line of the page in this process, which spares each the seconds that torch takes to import."""
    words = shlex.split(command)
    if words[0] == "cp" and words[1] == "-r":
        shutil.copytree(words[2], words[3])
    elif words[0] == "cp":
        shutil.copy(*words[1:])
    elif words[0] == "rm":
        Path(words[1]).unlink()
    elif words[:2] == ["python", "-m"]:
        main = importlib.import_module(COMMANDS[words[2]]).main
        assert main(words[3:]) == 0
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def test_every_command_of_the_format_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "tests" / "data")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    lines = BLOCK.partition("# what the other files expect")[0].replace("\\\n", " ").splitlines()
    commands = [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]
    assert len(commands) > 20
    for command in commands:
        run(command, monkeypatch)
    printed = capsys.readouterr().out
    assert "equals plain" in printed
    assert "DIFFERS" not in printed
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {
        "flux",
        "flux-published.safetensors",
        "flux-two-files",
        "flux-lite",
        "sana",
        "nvfp4",
        "flux-nvfp4",
        "lora",
    }
    assert len(list((tmp_path / "out" / "lora").iterdir())) == 9


def test_every_data_file_is_named_on_the_format_page():
    page = (ROOT / "docs" / "format.md").read_text()
    shown = {match.rstrip(".") for match in re.findall(r"tests/data/[\w./]+", page)}
    # Results of others, which tests compare with, and what belongs to a folder that is named.
    expected = re.compile(r"expected|to_diffusers|converted|compose\.result|numerics_emulated|nvfp4_legacy/")
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / "data").rglob("*.safetensors")]
    assert [file for file in files if file not in shown and not expected.search(file)] == []
