"""The model families this engine runs, and where each one's code is."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec

__all__ = ["FAMILIES", "Family", "family", "family_of_pipeline", "runner"]


@dataclass(frozen=True)
class Family:
    """A row of the table; modules and classes are imported when first asked for.

    `leaves` is the module that says which leaves become 4-bit (engine.models.install.Family), `runner_module` the one
    that makes pictures with the family's pipelines (encode, denoise, decode, settle).
    """

    name: str
    leaves_module: str
    runner_module: str
    pipelines: str

    @property
    def leaves(self) -> Any:
        return importlib.import_module(self.leaves_module)

    @property
    def transformer_class(self) -> Any:
        """The diffusers class of the family's transformer."""
        return getattr(importlib.import_module("diffusers"), self.leaves.MODEL_CLASS)


FAMILIES = {
    row.name: row
    for row in (
        Family("flux", "engine.models.flux", "engine.models.run_flux", pipelines="Flux"),
        Family("sana", "engine.models.sana", "engine.models.run_sana", pipelines="Sana"),
    )
}


# Models that start from more than words, by ModelSpec.runner.
_RUNNERS = {"redux": "engine.models.run_redux", "sketch": "engine.models.run_sketch"}


def runner(spec: ModelSpec) -> Any:
    """The module that makes pictures with a model, stage by stage: settle, encode, denoise, decode."""
    return importlib.import_module(_RUNNERS[spec.runner] if spec.runner else family(spec.family).runner_module)


def family(name: str) -> Family:
    """The row called `name`; raises ModelError when there is none."""
    if name not in FAMILIES:
        raise ModelError(f"family: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def family_of_pipeline(pipeline: str) -> Family | None:
    """The family that a diffusers pipeline class belongs to, by the class's name."""
    return next((row for row in FAMILIES.values() if pipeline.startswith(row.pipelines)), None)
