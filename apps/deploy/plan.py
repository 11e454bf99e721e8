"""What a Space shall be: every argument checked before anything is built."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.common.app import App
from apps.common.models import parted
from engine import ArgumentError, EngineError
from engine.models import catalogue
from engine.models.catalogue import ModelSpec

__all__ = ["HARDWARE", "ROOT", "ZERO", "DeployError", "Plan", "apps", "check_folder", "plan"]

ROOT = Path(__file__).resolve().parents[2]
ZERO = "zero-gpu"
# ZeroGPU's name in the hub's own list.
HARDWARE = {ZERO: "zero-a10g"}
# ZeroGPU offers 3.10 and 3.12; the project's pins want 3.11 or newer.
ZERO_PYTHON = "3.12"
PYTHONS = ("3.11", "3.12", "3.13")
# What an app takes besides its model's own weights.
_BESIDE = {"tiny-depth": ("depth-estimator-tiny",)}
_SPACE = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class DeployError(EngineError):
    """A Space could not be written or uploaded; the message says why and what to do, in one sentence."""


@dataclass(frozen=True)
class Plan:
    """One Space: an app, what it paints with and in which precisions, where it lives and what it runs on."""

    app: App
    spec: ModelSpec
    precisions: tuple[str, ...]
    space: str
    hardware: str
    python: str
    private: bool = False

    @property
    def zero(self) -> bool:
        """Whether the GPU is lent call by call."""
        return self.hardware == ZERO

    @property
    def cpu(self) -> bool:
        """Whether there is no GPU at all."""
        return self.hardware.startswith("cpu-")

    @property
    def weights(self) -> tuple[Path, ...]:
        """Folders of the zoo that the page needs; none for a model that comes from the hub."""
        if not self.spec.ships:
            return ()
        # A page offers the app's other small models beside the chosen one.
        rows = [self.spec, *(row for name in self.app.models if (row := catalogue.resolve(name)).ships)]
        zoo, names = catalogue.zoo_folder(), []
        for row in rows if self.spec in rows[1:] else rows[:1]:
            names += [Path(place).relative_to(zoo).parts[0] for place in self._places(row)]
            names += _BESIDE.get(row.name, ())
        return tuple(zoo / name for name in dict.fromkeys(names))

    @property
    def repositories(self) -> tuple[str, ...]:
        """Repositories of the hub that the model's weights come from."""
        hub = () if self.spec.ships else self._places(self.spec)
        return tuple(dict.fromkeys("/".join(place.split("/")[:2]) for place in hub))

    def _places(self, spec: ModelSpec) -> list[str]:
        kinds = dict.fromkeys(parted(name)[0] for name in self.precisions)
        # What does not ship is made there, as here.
        checkpoints = [spec.checkpoints[name] for name in kinds if name in spec.checkpoints and not spec.makes(name)]
        return [place for place in (spec.source, *checkpoints, spec.lora, spec.prior) if place]


def apps() -> list[str]:
    """The apps there are, by folder."""
    return sorted(path.parent.name for path in (ROOT / "apps").glob("*/run.py"))


def plan(
    app: str,
    space: str,
    *,
    model: str | None = None,
    precisions: Sequence[str] | None = None,
    hardware: str = ZERO,
    python: str | None = None,
    private: bool = False,
) -> Plan:
    """Check every argument. Raises DeployError, ArgumentError or ModelError naming the one that is wrong."""
    from apps.common.cli import precisions_of

    if not _SPACE.fullmatch(space):
        raise DeployError(f"space: expected OWNER/NAME as in the Space's address, got {space!r}")
    if app not in apps():
        raise DeployError(f"app: expected one of {', '.join(apps())}, got {app!r}")
    value: App = importlib.import_module(f"apps.{app}.run").APP
    spec = _model(model or value.models[0])
    chosen = precisions_of(spec, precisions)
    _check_hardware(hardware)
    return Plan(value, spec, chosen, space, hardware, _python(python, hardware), private)


def check_folder(folder: Path) -> None:
    """Raise DeployError unless `folder` can be written: it is not there yet, or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeployError(f"dry-run: expected a folder that is empty or not there yet, got {folder}")


def _model(model: str) -> ModelSpec:
    spec = catalogue.resolve(model)
    if spec.ships or not spec.local:
        return spec
    raise DeployError(
        f"model: expected one of {', '.join(catalogue.names())} or a hub id, got the folder {model}; "
        "upload it to the hub and give its id"
    )


def _check_hardware(hardware: str) -> None:
    from huggingface_hub import SpaceHardware

    known = [ZERO, *(kind.value for kind in SpaceHardware if kind.value not in HARDWARE.values())]
    if hardware not in known:
        raise DeployError(f"hardware: expected one of {', '.join(known)}, got {hardware!r}")


def _python(asked: str | None, hardware: str) -> str:
    """The Space's Python, as "3.12": the wheel is built by the Python that runs this, so they must be the same."""
    running = _running()
    wanted = asked or (ZERO_PYTHON if hardware == ZERO else running)
    allowed = (ZERO_PYTHON,) if hardware == ZERO else PYTHONS
    if wanted not in allowed:
        raise ArgumentError(f"python: expected {' or '.join(allowed)} on {hardware}, got {wanted}")
    if wanted != running:
        other = "" if hardware != ZERO else f", or choose --hardware cpu-basic, which takes {running}"
        raise ArgumentError(
            f"python: the wheel for a Space of Python {wanted} is built by Python {wanted}, and this is {running}; run "
            f"this command in an environment of python{wanted} with requirements.txt installed{other}"
        )
    return wanted


def _running() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
