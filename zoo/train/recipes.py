"""What `python -m zoo.train.everything` trains: each part's command, what it needs, and how it is tried once more."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from zoo.train.log import read

CONFIGS = Path(__file__).parents[1] / "configs"
WEIGHTS = Path(__file__).parents[1] / "weights"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The choices of a whole run. `vae` None trains an autoencoder for the base."""

    out: Path
    base: Path  # a FLUX folder to build on where this run trains none
    vae: Path | None
    gpus: int  # 0: the CPU
    smoke: bool = False
    resume: Path | None = None  # a FLUX folder from which the base goes on

    def model(self) -> Path:
        """The base that the others are tuned from: this run's own, once it has learned something."""
        own, told = self.out / "base" / "model", self.out / "base" / "logs" / "log.jsonl"
        learned = told.exists() and any(row["stage"] == "flow" and "valid" in row for row in read(told))
        return own if learned and (own / "model_index.json").exists() else self.base


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a part is trained. `command` makes its arguments; `again` are added for a second try after a failure."""

    name: str
    module: str
    config: str
    needs_base: bool
    command: Callable[[Plan, float], list[str]]
    again: tuple[str, ...] = ()

    def argv(self, plan: Plan, minutes: float, ranks: int, second: bool) -> list[str]:
        """The whole command line: `ranks` processes, through torchrun if there are several."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        line = [sys.executable, *launch, "-m", self.module, "--out", str(plan.out / self.name)]
        line += ["--minutes", f"{minutes:.2f}", *self.command(plan, minutes)]
        if self.needs_base:
            line += ["--base", str(plan.model())]
        if plan.smoke:
            config = "smoke" if self.config == "flux" else f"{self.config}_smoke"
            return [*line, "--config", str(CONFIGS / f"{config}.json"), "--max-steps", "2", "--device", "cpu"]
        return [*line, *(self.again if second else ())]


def _base(plan: Plan, minutes: float) -> list[str]:
    go_on = [] if plan.smoke or plan.resume is None else [*_GO_ON, "--resume", str(plan.resume)]
    return [*(["--vae", str(plan.vae)] if plan.vae else []), *go_on]


def _sana(plan: Plan, minutes: float) -> list[str]:
    # Two minutes go to workers, compilers and pictures; the autoencoder needs its share first.
    kept = plan.vae.parent.parent / "sana-tiny" / "vae" if plan.vae else None
    known = ["--vae", str(kept)] if kept and kept.is_dir() else []
    stages = {
        "render": min(0.8, 0.1 * minutes),
        "ae": min(3.5, 0.3 * minutes),
        "read": min(0.8, 0.1 * minutes),
        "flow": minutes,
    }
    smaller = [] if plan.smoke else ["--set", "pool.pictures=100000"]  # several parts share a GPU's memory
    if earlier := _earlier(plan, "sana-tiny"):
        known, stages = [*earlier, "--seed", "2", *_set("flow.lr=8e-4")], {**stages, "ae": 0.0}
    return [*known, *smaller, *(word for name, m in stages.items() for word in (f"--minutes-{name}", f"{m:.2f}"))]


def _earlier(plan: Plan, name: str = "") -> list[str]:
    """Go on from a part's weights beside the base that the run goes on from, if they are there."""
    folder = plan.resume.parent / name if plan.resume else None
    return ["--resume", str(folder)] if folder and folder.is_dir() and not plan.smoke else []


def _from(name: str) -> Callable[[Plan, float], list[str]]:
    return lambda plan, minutes: _earlier(plan, name)


def _kinds(plan: Plan, minutes: float) -> list[str]:
    return ["--kind", "canny", "depth", *(_earlier(plan) if _earlier(plan, "canny-tiny") else [])]


def _set(*changes: str) -> tuple[str, ...]:
    return tuple(word for change in changes for word in ("--set", change))


# Other pictures than the first run's, and a rate that does not undo what it learned.
_GO_ON = ["--seed", "2", *_set("flow.lr=8e-4")]
# Without a recorded step the base's pace is that of the processor, whatever the batch: so a larger batch costs nothing.
_PLAIN = _set("flow.capture=false", "distill.capture=false", "flow.batch=448", "distill.batch=320")
_LESS = _set("train.batch=128")
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("base", "zoo.train.flux_tiny", "flux", False, _base, _PLAIN),
        Recipe("control", "zoo.train.control", "control", True, _kinds, _LESS),
        Recipe("fill", "zoo.train.fill", "fill", True, _from("fill-tiny"), _LESS),
        Recipe("sana", "zoo.train.sana", "sana", False, _sana, _set("flow.capture=false", "read.capture=false")),
        Recipe("redux", "zoo.train.redux", "redux", True, _from("redux-tiny"), _set("train.batch=96")),
        Recipe("sketch", "zoo.train.sketch", "sketch", True, _from("sketch-tiny"), _LESS),
        Recipe("depth", "zoo.train.depth_estimator", "depth", False, lambda plan, minutes: [], _set("train.batch=48")),
    )
}
