"""Train all small models in one go, within a time by the clock, on one host's GPUs.

    python -m zoo.train.everything --out runs/all --minutes 26 --wait 570     start, and watch for 570 seconds
    python -m zoo.train.everything --out runs/all --wait 570                  watch on
    python -m zoo.train.everything --out runs/all --status                    one look
    python -m zoo.train.everything --out runs/all --stop                      end it

The base comes first, on all GPUs (from three on, the last one goes to parts that need no base). Then the others share
the GPUs, up to `--share` on each, every one in its own process on processor cores of its own: most of a small model's
time goes to compilers, workers and launches, so that parts side by side cost each other little. The run is a process
session of its own: it goes on when the command that started it ends. A part that fails is tried once more, with
smaller or plainer settings; it never ends the others. OUT/PART holds each part's run, OUT/PART.log what it printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from zoo.train.progress import alive, line, watch
from zoo.train.recipes import RECIPES, WEIGHTS, Plan, Recipe

GRACE = 0.7  # minutes that a part may take longer than told
STARTING = 0.25  # minutes that pass before a part looks at its own clock
SHORTEST = 1.5  # minutes under which a part is not worth starting


@dataclasses.dataclass
class Job:
    """One part's way through the run."""

    recipe: Recipe
    state: str = "waiting"  # running, done, failed, late, left out
    process: subprocess.Popen | None = None
    began: float = 0.0
    minutes: float = 0.0
    slot: int = -1
    tries: int = 0

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def over(self) -> bool:
        return self.state not in ("waiting", "running")


class Supervisor:
    """Starts parts when their turn comes, watches them, writes OUT/status.json."""

    def __init__(self, plan: Plan, names: list[str], minutes: float, base_part: float, share: int) -> None:
        self.plan, self.began, self.end = plan, time.time(), time.time() + 60 * minutes
        self.jobs = [Job(RECIPES[name]) for name in names]
        self.base_minutes, self.share = base_part * minutes if len(names) > 1 else minutes, share
        self.gpus, self.cores = max(1, plan.gpus), sorted(os.sched_getaffinity(0))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",") if visible else [str(i) for i in range(self.gpus)]

    def run(self) -> None:
        self.write()
        said = 0.0
        while not all(job.over for job in self.jobs):
            self.look()
            self.start()
            self.write()
            if time.time() - said >= 20:
                said = time.time()
                print(line(self.plan.out), flush=True)
            running = [job for job in self.jobs if job.state == "running"]
            try:
                if running:
                    running[0].process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
        self.write(finished=True)
        print(line(self.plan.out), flush=True)

    def look(self) -> None:
        """Note which parts ended, and end those that are late."""
        for job in self.jobs:
            if job.state != "running":
                continue
            status, took = job.process.poll(), (time.time() - job.began) / 60
            if status is None and took > job.minutes + GRACE:
                self.kill(job)
                job.state = "late"
            elif status == 0:
                job.state = "done"
            elif status is not None:
                left = self.minutes_for(job)
                print(f"{job.name} ended with status {status} after {took:.1f} minutes", flush=True)
                job.state = "waiting" if job.tries < 2 and left >= SHORTEST else "failed"

    def start(self) -> None:
        """Start what can run now."""
        base = next((job for job in self.jobs if job.name == "base"), None)
        busy = base is not None and not base.over
        free = [slot for slot in self.slots(busy) if all(j.slot != slot or j.state != "running" for j in self.jobs)]
        for job in self.jobs:
            if job.state != "waiting" or (busy and job is not base and (job.recipe.needs_base or not free)):
                continue
            if self.minutes_for(job) < SHORTEST and not self.plan.smoke:
                job.state = "left out"
            elif job is base or free:
                slot = -1 if job is base else free.pop(0)
                try:
                    self.launch(job, slot, list(range(self.base_gpus())) if job is base else [slot % self.gpus])
                except OSError as error:
                    print(f"{job.name} could not start: {error}", flush=True)
                    job.state = "failed"

    def base_gpus(self) -> int:
        return self.gpus - 1 if self.gpus > 2 else self.gpus

    def slots(self, busy: bool) -> list[int]:
        """Places to run in, numbered so that places s, s + gpus, ... are on GPU s; while the base trains, few."""
        every = list(range(self.gpus * self.share))
        return [s for s in every if s % self.gpus >= self.base_gpus()] if busy else every

    def minutes_for(self, job: Job) -> float:
        """How long a part may run if it starts now."""
        left = (self.end - time.time()) / 60 - 0.2
        if job.name == "base":
            return min(left, self.base_minutes - (time.time() - self.began) / 60)
        others = [other for other in self.jobs if other is not job and other.name != "base"]
        # Those that began just now are of the same round as this one.
        fresh = sum(other.state == "running" and time.time() - other.began < 60 for other in others)
        behind = sum(other.state == "waiting" for other in others)
        return max(min(left, SHORTEST), left / math.ceil((1 + fresh + behind) / (self.gpus * self.share)))

    def launch(self, job: Job, slot: int, gpus: list[int]) -> None:
        second, job.tries = job.tries > 0, job.tries + 1
        job.minutes, job.began, job.slot, job.state = self.minutes_for(job), time.time(), slot, "running"
        ranks = len(gpus) if self.plan.gpus else 1
        argv = job.recipe.argv(self.plan, max(0.5, job.minutes - STARTING), ranks, second)
        if job.name == "base" and second and (self.plan.out / "base" / "model" / "model_index.json").exists():
            argv = [*argv, "--resume", str(self.plan.out / "base" / "model")]
        cores = self.cores_of(slot)
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, min(4, len(cores) // 2)))}
        if self.plan.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[gpu] for gpu in gpus)
        print(f"{job.name} starts, {job.minutes:.1f} minutes on GPU {gpus}, {len(cores)} cores", flush=True)
        with (self.plan.out / f"{job.name}.log").open("ab") as log:
            log.write((" ".join(argv) + "\n").encode())
            log.flush()
            job.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                           start_new_session=True)  # fmt: skip
        os.sched_setaffinity(job.process.pid, cores)

    def cores_of(self, slot: int) -> list[int]:
        """All cores for the base; else one of as many ranges as parts run side by side."""
        jobs = max(1, min(len(self.jobs) - any(j.name == "base" for j in self.jobs), self.gpus * self.share))
        if slot < 0 or len(self.cores) < 2 * jobs:
            return self.cores
        step = len(self.cores) // jobs
        first = slot % jobs * step
        return self.cores[first : first + step]

    def kill(self, job: Job) -> None:
        """End a part and the processes it started: they share a session that this one made, but for torchrun's, which
        it ends itself if given the time."""
        for how, wait in ((signal.SIGTERM, 45), (signal.SIGKILL, 10)):
            try:
                os.killpg(job.process.pid, how)
                job.process.wait(timeout=wait)
                return
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                return

    def write(self, finished: bool = False) -> None:
        row = lambda job: {"state": job.state, "began": job.began, "minutes": round(job.minutes, 2)}  # noqa: E731
        rows = {job.name: row(job) for job in self.jobs}
        told = {"pid": os.getpid(), "began": self.began, "end": self.end, "finished": finished, "parts": rows}
        new = self.plan.out / "status.json.new"
        new.write_text(json.dumps(told, indent=1) + "\n")
        new.replace(self.plan.out / "status.json")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=26.0, help="of the whole run")
    parser.add_argument("--gpus", type=int, help="how many to use; 0 is the CPU (default: all there are)")
    parser.add_argument("--base-part", type=float, default=0.62, help="the base's share of the time")
    parser.add_argument("--share", type=int, default=3, help="parts side by side on one GPU")
    parser.add_argument("--base", type=Path, default=WEIGHTS / "flux-tiny", help="to tune where no base is trained")
    parser.add_argument("--vae", type=Path, default=WEIGHTS / "flux-tiny" / "vae", help="kept; 'none' trains one")
    parser.add_argument("--resume-base", type=Path, help="a FLUX folder from which the base goes on")
    parser.add_argument("--only", nargs="+", choices=sorted(RECIPES), default=[])
    parser.add_argument("--skip", nargs="+", choices=sorted(RECIPES), default=[])
    parser.add_argument("--wait", type=float, metavar="SECONDS", help="watch for so long; starts the run if none was")
    parser.add_argument("--status", action="store_true", help="print one line")
    parser.add_argument("--stop", action="store_true", help="end the run and its parts")
    parser.add_argument("--smoke", action="store_true", help="two steps of tiny models on the CPU, for trials")
    parser.add_argument("--supervise", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _supervise(args: argparse.Namespace) -> None:
    import torch

    gpus = 0 if args.smoke else torch.cuda.device_count() if args.gpus is None else args.gpus
    vae = None if args.smoke or str(args.vae) == "none" or not args.vae.is_dir() else args.vae
    names = [name for name in RECIPES if (not args.only or name in args.only) and name not in args.skip]
    plan = Plan(
        args.out.resolve(),
        args.base.resolve(),
        vae and vae.resolve(),
        gpus,
        args.smoke,
        args.resume_base and args.resume_base.resolve(),
    )
    supervisor = Supervisor(plan, names, args.minutes, args.base_part, args.share)

    def stop(*_: object) -> None:
        for job in supervisor.jobs:
            if job.state == "running":
                supervisor.kill(job)
        supervisor.write(finished=True)
        sys.exit(1)

    signal.signal(signal.SIGTERM, stop)
    supervisor.run()


def _begin(argv: list[str], out: Path) -> None:
    """Start the supervisor in a session of its own, and wait until it is there."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "everything.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "zoo.train.everything", *argv, "--supervise"], stdout=log,
                                   stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    while not (out / "status.json").exists():
        if process.poll() is not None:
            raise SystemExit(f"the run did not start; see {out / 'everything.log'}")
        time.sleep(0.1)
    process.returncode = 0  # it outlives this command on purpose: nothing here waits for it


def main(argv: list[str] | None = None) -> int:
    """0 while the run goes on and when all parts are done; 1 when it is over and some part is not done."""
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.supervise:
        _supervise(args)
        return 0
    if not (args.out / "status.json").exists():
        if args.status or args.stop:
            raise SystemExit(f"{args.out} holds no run")
        _begin(argv, args.out)
    if args.stop and alive(args.out):
        os.kill(json.loads((args.out / "status.json").read_text())["pid"], signal.SIGTERM)
    over = watch(args.out, args.wait or 0.0)
    states = {part["state"] for part in json.loads((args.out / "status.json").read_text())["parts"].values()}
    return int(over and states != {"done"})


if __name__ == "__main__":
    raise SystemExit(main())
