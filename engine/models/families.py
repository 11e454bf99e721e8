"""The model families this engine runs, and where each one's code is.

A transformer that has no family is served too, by its structure alone (engine.models.other).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError

if TYPE_CHECKING:
    from engine.models.catalogue import ModelSpec

__all__ = ["FAMILIES", "Family", "family", "family_of_pipeline", "is_transformer", "runner"]


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


@dataclass(frozen=True)
class _Other(Family):
    """A diffusers transformer that has no family of its own, under the name of its class."""

    @property
    def leaves(self) -> Any:
        return importlib.import_module(self.leaves_module).Leaves(self.name)


def family(name: str) -> Family:
    """The row called `name`, or one for any transformer class of diffusers; raises ModelError when there is none."""
    if name in FAMILIES:
        return FAMILIES[name]
    if is_transformer(name):
        return _Other(name, "engine.models.other", "engine.models.run_other", pipelines="")
    raise ModelError(f"family: expected {', '.join(FAMILIES)} or a transformer class of diffusers, got {name!r}")


def is_transformer(name: str) -> bool:
    """Whether diffusers has a transformer class of this name."""
    return "Transformer" in name and hasattr(importlib.import_module("diffusers"), name)


def family_of_pipeline(pipeline: str) -> Family | None:
    """The family that a diffusers pipeline class belongs to, by the class's name."""
    return next((row for row in FAMILIES.values() if pipeline.startswith(row.pipelines)), None)
