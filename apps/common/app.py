"""An app is a value: its words, its models, its controls, its examples, and how it prepares a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apps.common.controls import Control
from engine.models import catalogue
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from PIL.Image import Image


__all__ = ["App", "no_inputs"]

Values = Mapping[str, Any]


def no_inputs(values: Values, spec: ModelSpec) -> dict[str, Any]:
    """The `prepare` of an app whose pipeline takes text alone."""
    return {}


@dataclass(frozen=True)
class App:
    """One app of the suite.

    `slug` is its folder; `nibble` (0 to 15) the four bits its sign shows. `models` are names of the catalogue, the
    small ones first and the large ones in the order `--model auto` prefers them. `prepare` turns the control values,
    by name, into the pipeline's inputs beyond text for a model; it is pure, and raises RequestError for a value it
    cannot use. `seen` names the input that the page shows as what the model really saw, and the words above it.
    `live` names the control whose every change paints anew, where there is one.
    `finish` makes the final picture of a painted one, its request and the control values, where the app has something
    to add to it (fill puts it back into the visitor's own). `reuse` names the control that can take a result.
    `examples` are control values by name that suit the small model; `large_examples` any other; an example without a
    prompt has a title in `titles`, by its number.

    Raises ValueError when a name is used twice, an example names a control that is not there, or a model is unknown.
    """

    slug: str
    title: str
    summary: str
    nibble: int
    models: tuple[str, ...]
    controls: tuple[Control, ...]
    examples: tuple[Values, ...] = ()
    large_examples: tuple[Values, ...] = ()
    prepare: Callable[[Values, ModelSpec], dict[str, Any]] = no_inputs
    seen: tuple[str, str] | None = None
    live: str | None = None
    titles: tuple[str, ...] = ()
    finish: Callable[..., Image] | None = None
    reuse: str | None = None
    about: str = ""

    def __post_init__(self) -> None:
        names = [control.name for control in self.controls]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.slug}: two controls are named {', '.join(twice)}")
        if "prompt" not in names:
            raise ValueError(f"{self.slug}: expected a control named 'prompt', got {', '.join(names) or 'none'}")
        if not 0 <= self.nibble <= 15:
            raise ValueError(f"{self.slug}: expected a nibble from 0 to 15, got {self.nibble}")
        if not self.models:
            raise ValueError(f"{self.slug}: expected at least one model")
        for model in self.models:
            if model not in catalogue.names():
                raise ValueError(f"{self.slug}: expected models of {', '.join(catalogue.names())}, got {model!r}")
        for number, example in enumerate((*self.examples, *self.large_examples), 1):
            unknown = sorted(set(example) - set(names))
            if unknown:
                raise ValueError(
                    f"{self.slug}: example {number} sets {', '.join(unknown)}; the controls are {', '.join(names)}"
                )

    def examples_for(self, spec: ModelSpec) -> tuple[Values, ...]:
        """The examples that suit a model."""
        small = spec.ships or spec.name == catalogue.resolve(self.models[0]).name
        return self.examples if small or not self.large_examples else self.large_examples

    def titles_for(self, spec: ModelSpec) -> list[str]:
        """What the examples that suit a model are called: their prompts, or titles where they have none."""
        examples = self.examples_for(spec)
        return [str(example.get("prompt") or self.titles[number]) for number, example in enumerate(examples)]

    def control(self, name: str) -> Control:
        """The control of that name; KeyError when there is none."""
        for control in self.controls:
            if control.name == name:
                return control
        raise KeyError(name)
