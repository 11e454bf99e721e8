"""The house rules that a machine can check: no traces of one machine, one set of versions, one way to run the tests."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Written so that this file does not find itself.
MACHINE_PATH = re.compile(
    "|".join([r"(?<![\w.~])/" + r"(?:work|home/\w+|root|Users/\w+)/", "/opt/" + "venv", r"\b/" + "tmp/"])
)
BINARY = {".png", ".jpg", ".webp", ".safetensors", ".npz", ".npy", ".pt", ".ico", ".woff2", ".gif", ".gz"}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout (a source archive, say)")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in tracked():
        if path.suffix in BINARY:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert found == []


def test_no_pickle_is_committed() -> None:
    pickles = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.suffix in pickles] == []


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {m[1].lower(): m[2] for line in lines if (m := re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.+]+)", line))}


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_pinned(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line and line[0] not in "#-"]
    assert len(pins(name)) == len(lines), "every requirement is NAME==VERSION"


def test_requirements_end_in_the_project_itself() -> None:
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()[-1] == "-e ."
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()


def test_no_requirement_is_torchvision() -> None:
    for name in ("requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        assert "torchvision" not in (ROOT / name).read_text(encoding="utf-8")


def test_ci_runs_what_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -r requirements-dev.txt && pytest" in readme
    assert re.search(r"^pip install -q -r requirements-dev\.txt$", ci, re.MULTILINE)
    assert ci.splitlines()[-1] == "pytest"
