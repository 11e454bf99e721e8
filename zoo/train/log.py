"""A run's log: JSON lines to a file, one short line to the terminal, curves to a PNG at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

PEAK_FLOPS = {"cuda": 790e12}  # bf16 matrix product measured on an H200; other devices report no utilisation


class Log:
    """Writes `folder`/log.jsonl. In processes other than the chief it does nothing."""

    def __init__(self, folder: Path, chief: bool = True, started: float | None = None) -> None:
        self.path, self.chief, self.started = Path(folder) / "log.jsonl", chief, started or time.time()
        if chief:
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, stage: str, **values: object) -> None:
        if not self.chief:
            return
        row = {"stage": stage, "seconds": round(time.time() - self.started, 2), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"[{row['seconds']:7.1f}s] {stage:8s} {shown}", flush=True)


def unless_it_fails(log: Log, what: str, make: Callable[[], object]) -> None:
    """Make something that training can do without, a sheet say: a failure is logged, not raised."""
    try:
        make()
    except Exception as error:
        log("warning", what=what, error=f"{type(error).__name__}: {error}"[:500])


class Meter:
    """Averages what a stage measures and logs it every few seconds, with the pace. Values wait on the device."""

    def __init__(self, log: Log, stage: str, pictures_a_step: int, flops_a_picture: float, device: str, world: int,
                 every: float = 5.0) -> None:  # fmt: skip
        self.log, self.stage, self.pictures, self.flops = log, stage, pictures_a_step, flops_a_picture
        self.peak, self.every = PEAK_FLOPS.get(device, 0.0) * world, every
        self.sums: dict[str, object] = {}
        self.count, self.step, self.last = 0, 0, time.time()

    def add(self, **values: object) -> None:
        """Add a step's values: 0-d tensors or numbers."""
        self.step, self.count = self.step + 1, self.count + 1
        for name, value in values.items():
            value = value.detach() if hasattr(value, "detach") else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def report(self, force: bool = False, **extra: object) -> dict[str, float]:
        """Log if `every` seconds have passed since the last line, and return the means; else nothing.

        Waits for the device when it does.
        """
        if not self.count or not (force or time.time() - self.last >= self.every):
            return {}
        means = {name: round(float(value) / self.count, 6) for name, value in self.sums.items()}
        pace = self.count / max(1e-9, time.time() - self.last)
        speed = {"it_s": round(pace, 2), "pic_s": round(pace * self.pictures, 1)}
        if self.peak:
            speed["mfu"] = round(pace * self.pictures * self.flops / self.peak, 4)
        self.log(self.stage, step=self.step, **means, **speed, **extra)
        self.sums, self.count, self.last = {}, 0, time.time()
        return means


def read(path: Path) -> list[dict]:
    """The rows of a log; a last line that was cut off is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot(path: Path, out: Path) -> None:
    """Loss curves of every stage in a log, one panel a stage, over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in read(path) if "loss" in row]
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    if not stages:
        return
    figure, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.6), squeeze=False)
    for axis, stage in zip(axes[0], stages, strict=True):
        part = [row for row in rows if row["stage"] == stage]
        for name in ("loss", "valid", "l1", "text"):
            points = [(row["seconds"], row[name]) for row in part if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set(title=stage, xlabel="seconds", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=90)
    plt.close(figure)
