"""A Space that runs: its folder in an environment of its own, and an app on a GPU that is lent call by call."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import pytest
import torch
from gradio_client import Client
from PIL import Image

from apps.common.pool import Pool
from apps.common.runner import Began, Failed, Finished, Job, Stepped, Stopped, events
from apps.deploy import folder, zero
from apps.deploy.plan import plan
from apps.fill import run as fill
from engine import Request
from engine.models import catalogue
from tests.apps import fake

ROOT = Path(__file__).resolve().parents[2]
# By default the new environment sees this one's packages, but not the checkout; set this to install them all anew.
ANEW = "NIBBLE_INSTALL_ANEW"
SCENE = "a large red metal sphere left of a small blue cube"
TINY = catalogue.resolve("tiny")


def environment(home: Path, space: Path) -> Path:
    """A new environment with what the Space asks for and what Spaces bring. Returns its Python."""
    anew = ANEW in os.environ
    venv.create(home, with_pip=anew, symlinks=True)
    python = home / "bin" / "python"
    if anew:
        # The index of CPU builds is not needed for these versions, and may be out of reach.
        lines = (space / "requirements.txt").read_text(encoding="utf-8").splitlines()
        wanted = [line for line in lines if not line.startswith("--")]
        brought = [
            f"{name}=={folder.pins()[name.partition('[')[0]]}" for name in ("gradio[mcp]", "spaces", "huggingface_hub")
        ]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted, *brought], check=True, timeout=280)
    else:
        # A folder named in a .pth file is searched, and its own .pth files, the checkout's among them, are not read.
        site = next(home.glob("lib/python*/site-packages"))
        (site / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


def away_from_here() -> dict[str, str]:
    """The environment's variables without those that lead to this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ENGINE_ZOO")}


@contextmanager
def started(python: Path, space: Path, log: Path) -> Iterator[str]:
    """The Space's page while it runs, started from another folder and with nothing of this checkout in sight."""
    with log.open("w") as out:
        running = subprocess.Popen(
            [python, "-u", space / "app.py"], cwd=log.parent, stdout=out, stderr=subprocess.STDOUT,
            env=away_from_here() | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        for _ in range(600):
            if running.poll() is not None or "Page: " in log.read_text():
                break
            time.sleep(0.1)
        found = re.search(r"Page: (\S+)", log.read_text())
        assert found, log.read_text()
        yield found[1]
    finally:
        running.terminate()  # not SIGINT: a shell's background jobs, and what they start, do not hear it
        running.wait(30)


def lending(paint) -> tuple[Job, list]:
    job = Job(Request(SCENE), ("bf16", "int4"), {})
    return job, zero._relay(paint, job)


def test_stop_ends_what_runs_on_a_lent_gpu():
    closed = []

    def paint(*_):
        try:
            yield Began("bf16")
            yield Began("bf16")
        finally:
            closed.append(True)

    job, relayed = lending(paint)
    assert next(relayed) == Began("bf16")
    job.stop.set()
    assert list(relayed) == [Stopped("bf16"), Stopped("int4")]
    assert closed == [True]


def test_a_gpu_that_is_not_lent_fails_each_column_and_says_why():
    def paint(*_):
        raise gr.Error("You have exceeded your quota")
        yield

    _, relayed = lending(paint)
    assert [next(relayed), next(relayed)] == [Failed(name, "You have exceeded your quota") for name in ("bf16", "int4")]
    with pytest.raises(gr.Error):
        next(relayed)


def test_what_a_fork_is_given_survives_pickling():
    given = []

    def paint(cargo):
        given.append(cargo)
        yield Began("bf16")

    job, relayed = lending(paint)
    job.preview, job.finish = True, fill.APP.finish
    list(relayed)
    there = Job(**pickle.loads(pickle.dumps(given[0])))
    assert (there.request, there.precisions, there.preview) == (job.request, job.precisions, True)
    assert there.finish is job.finish
    assert there.stop is not job.stop


def test_what_a_fork_sends_back_survives_pickling():
    pool = Pool(TINY, TINY.precisions, fake.loader())
    zero.borrow([pool])  # `spaces` changes nothing where no GPU is lent
    happened = list(events(pool, Job(Request(SCENE, steps=2), TINY.precisions, {})))
    assert [type(event) for event in happened if not isinstance(event, Stepped)] == [Began, Finished] * len(
        TINY.precisions
    )
    again = pickle.loads(pickle.dumps(happened))
    assert [event.result.image.tobytes() for event in again if isinstance(event, Finished)] == [
        event.result.image.tobytes() for event in happened if isinstance(event, Finished)
    ]


@pytest.mark.slow
def test_a_space_runs_by_itself(tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    made = plan("flux_t2i", "me/nibble", hardware="cpu-basic", python=version)
    space = folder.write(made, tmp_path / "space")
    python = environment(tmp_path / "env", space)
    code = "import importlib.util as u; print(u.find_spec('apps'), u.find_spec('safety'), bool(u.find_spec('torch')))"
    look = [python, "-c", code]
    seen = subprocess.run(look, cwd=tmp_path, env=away_from_here(), capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["None", "None", "True"]
    with started(python, space, tmp_path / "log") as url:
        answer, facts = Client(url, verbose=False).predict(prompt=SCENE, seed=7, precision="int4", api_name="/generate")
    picture = Image.open(answer)
    assert picture.size == (256, 256)
    assert facts["settings"]["backend"] != "reference"  # the wheel's own kernels
    assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 100


@pytest.mark.slow
def test_a_job_survives_fork_and_pickle_where_the_gpu_is_lent():
    done = subprocess.run(
        [sys.executable, "-m", "tests.apps.lent"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    # Each call is a fork of its own, so the LoRA's strength must come with the request.
    assert told["weak"] == told["weak again"] == told["here"]
    assert told["weak"][-2] == "Finished"
    assert told["strong"][-1] != told["weak"][-1]
    assert told["stopped"] == ["Began", "Stopped"]
    assert told["api"] > 10_000
    assert told["settings"]["prompt"] == "a purple cone"
    assert len(told["seconds"]) == 5
    assert set(told["seconds"]) == {6}
