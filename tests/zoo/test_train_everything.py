"""The run of all parts: what it starts when, what a failing or late part costs, and how it is carried home."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from zoo.train import bundle, everything
from zoo.train.recipes import RECIPES, Plan, Recipe


class Scripted(Recipe):
    """A part that runs a line of Python instead of a training."""

    def argv(self, plan, minutes, ranks, second):
        return [sys.executable, "-c", self.module]


def part(name, script, needs_base=False):
    return everything.Job(Scripted(name, script, "", needs_base, lambda plan, minutes: []))


def supervise(out, jobs, minutes=10.0):
    out.mkdir(exist_ok=True)
    told = everything.Supervisor(Plan(out, out, None, 0, smoke=True), [], minutes, 0.6, share=3)
    told.jobs = jobs
    told.run()
    return {job.name: job.state for job in jobs}


def test_a_part_that_fails_is_tried_again_and_the_others_go_on(tmp_path):
    flag = tmp_path / "flag"
    second = (
        f"import pathlib; f = pathlib.Path({str(flag)!r}); seen = f.exists(); "
        "f.touch(); raise SystemExit(3 * (not seen))"
    )
    states = supervise(tmp_path / "run", [part("a", "raise SystemExit(1)"), part("b", "pass"), part("c", second)])
    assert states == {"a": "failed", "b": "done", "c": "done"}
    told = json.loads((tmp_path / "run" / "status.json").read_text())
    assert told["finished"]
    assert not everything.alive(tmp_path / "run")
    line = everything.line(tmp_path / "run")
    assert "a failed" in line
    assert "c done" in line


def test_what_needs_the_base_starts_after_it(tmp_path):
    note = lambda name: f"import time; open({str(tmp_path / name)!r}, 'w').write(str(time.time()))"  # noqa: E731
    jobs = [part("base", "import time; time.sleep(0.6);" + note("base")), part("x", note("x"), needs_base=True)]
    assert supervise(tmp_path / "run", jobs) == {"base": "done", "x": "done"}
    assert float((tmp_path / "x").read_text()) > float((tmp_path / "base").read_text())


def test_a_late_part_is_ended_with_what_it_started(tmp_path, monkeypatch):
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    script = child + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    monkeypatch.setattr(everything, "GRACE", 0.02)
    monkeypatch.setattr(everything.Supervisor, "minutes_for", lambda self, job: 0.02)
    assert supervise(tmp_path / "run", [part("slow", script)]) == {"slow": "late"}
    process, until = Path("/proc") / (tmp_path / "pid").read_text(), time.time() + 5
    gone = lambda: not process.exists() or "Z" in (process / "stat").read_text().split()[2]  # noqa: E731
    while not gone() and time.time() < until:
        time.sleep(0.05)
    assert gone()


@pytest.mark.parametrize(("gpus", "base", "early"), [(1, 1, []), (2, 2, []), (4, 3, [3])])
def test_the_base_takes_the_gpus(tmp_path, gpus, base, early):
    told = everything.Supervisor(Plan(tmp_path, tmp_path, None, gpus), ["base", *RECIPES], 26.0, 0.6, share=3)
    assert told.base_gpus() == base
    assert sorted({slot % gpus for slot in told.slots(busy=True)}) == early
    assert sorted({slot % gpus for slot in told.slots(busy=False)}) == list(range(gpus))


def test_parts_share_the_time_in_waves(tmp_path):
    told = everything.Supervisor(Plan(tmp_path, tmp_path, None, 1), list(RECIPES)[1:], 10.0, 0.6, share=3)
    assert told.minutes_for(told.jobs[0]) == pytest.approx(4.9, abs=0.1)
    for job in told.jobs[:3]:  # the first round is over, and the second begins with half of the time left
        job.state, job.began = "done", told.began - 300
    told.end = time.time() + 300
    assert told.minutes_for(told.jobs[3]) == pytest.approx(4.8, abs=0.1)
    told.jobs[3].state, told.jobs[3].began = "running", time.time()
    assert told.minutes_for(told.jobs[4]) == pytest.approx(4.8, abs=0.1)
    two = everything.Supervisor(Plan(tmp_path, tmp_path, None, 2), list(RECIPES)[1:], 10.0, 0.6, share=3)
    assert two.minutes_for(two.jobs[0]) == pytest.approx(9.8, abs=0.1)


def test_a_base_that_learned_nothing_is_not_built_on(tmp_path):
    plan = Plan(tmp_path / "run", tmp_path / "known", None, 1)
    for folder, text in (("model", "model_index.json"), ("logs", "log.jsonl")):
        (plan.out / "base" / folder).mkdir(parents=True)
        (plan.out / "base" / folder / text).write_text(json.dumps({"stage": "vae", "psnr": 30.0}) + "\n")
    assert plan.model() == plan.base
    with (plan.out / "base" / "logs" / "log.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "flow", "valid": 0.2}) + "\n")
    assert plan.model() == plan.out / "base" / "model"


def test_every_command_names_settings_that_exist(tmp_path):
    """The drivers' own parsers and configurations take what the recipes pass, second tries included."""
    import importlib

    from zoo.train.flux_tiny import read_config

    plan = Plan(tmp_path, tmp_path, tmp_path / "flux-tiny" / "vae", 1)
    for recipe in RECIPES.values():
        argv = recipe.argv(plan, 5.0, 1, second=True)
        module = importlib.import_module(recipe.module)
        if hasattr(module, "arguments"):
            args = module.arguments(argv[argv.index(recipe.module) + 1 :])
            assert read_config(args.config, args.set)
        else:
            read_config(module.CONFIG, [argv[i + 1] for i, word in enumerate(argv) if word == "--set"])


def test_parts_go_on_from_the_weights_beside_the_base(tmp_path):
    """What lies beside the base that a run goes on from is where its other parts start; nothing there, nothing said."""
    beside = tmp_path / "weights"
    alone = Plan(tmp_path, tmp_path, None, 1, resume=beside / "flux-tiny")
    for name in ("flux-tiny", "canny-tiny", "fill-tiny", "sana-tiny"):
        (beside / name).mkdir(parents=True)
    starts = {name: recipe.argv(alone, 5.0, 1, second=False) for name, recipe in RECIPES.items()}
    told = {name: argv[argv.index("--resume") + 1] for name, argv in starts.items() if "--resume" in argv}
    wanted = {"base": "flux-tiny", "control": "", "fill": "fill-tiny", "sana": "sana-tiny"}
    assert told == {name: str(beside / folder) for name, folder in wanted.items()}


@pytest.fixture(scope="module")
def depth_run(tmp_path_factory):
    """A detached run of one real part, started and watched as a user does."""
    out = tmp_path_factory.mktemp("all") / "run"
    argv = ["--out", str(out), "--only", "depth", "--smoke", "--minutes", "4"]
    assert everything.main([*argv, "--wait", "120"]) == 0
    return out


def test_a_real_part_runs_detached_to_its_end(depth_run):
    assert json.loads((depth_run / "status.json").read_text())["parts"]["depth"]["state"] == "done"
    assert (depth_run / "depth" / "depth-tiny" / "model.safetensors").exists()
    assert everything.main(["--out", str(depth_run), "--status"]) == 0


def test_parts_are_carried_home_without_what_ships_already(depth_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(depth_run, run)
    shutil.copytree(bundle.SHIPPED, run / "base" / "model" / "vae")
    (run / "base" / "model" / "model_index.json").write_text("{}")
    (run / "redux" / "model").mkdir(parents=True)
    (run / "redux" / "model" / "text_encoder").symlink_to("../../base/model/vae", target_is_directory=True)
    names = [str(p) for p in bundle.members(run)]
    assert names[0] == "base/model/model_index.json"
    assert not [name for name in names if name.startswith(("base/model/vae", "redux"))]
    assert {"depth/depth-tiny/model.safetensors", "depth/logs/log.jsonl", "depth.log", "status.json"} <= {*names}
    assert "base/model/model_index.json" not in map(str, bundle.members(run, ("depth",)))
    bundle.bundle(run, tmp_path / "parts", max_mib=0.5)
    bundle.unbundle(tmp_path / "parts", tmp_path / "back")
    same = tmp_path / "back" / "depth" / "depth-tiny" / "model.safetensors"
    assert same.read_bytes() == (run / "depth" / "depth-tiny" / "model.safetensors").read_bytes()
