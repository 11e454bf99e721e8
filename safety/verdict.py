"""What a checker answers, and what it raises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Checker", "ImageChecker", "SafetyError", "Verdict", "worst"]


class SafetyError(RuntimeError):
    """A checker cannot be loaded or asked for; the message is one sentence or two that say what to do."""


@dataclass(frozen=True)
class Verdict:
    """A checker's answer on one prompt or picture.

    `score` runs from 0 (harmless) to 1; what it means in between is the checker's own (a probability for the models).
    `category` is None when nothing was found. `reason` is a sentence for the person who wrote the prompt.
    """

    allowed: bool
    category: str | None
    score: float
    checker: str
    reason: str


@runtime_checkable
class Checker(Protocol):
    """Anything that judges a prompt; the same prompt always gets the same verdict."""

    @property
    def name(self) -> str: ...

    def check(self, prompt: str) -> Verdict: ...


@runtime_checkable
class ImageChecker(Protocol):
    """Anything that judges a picture."""

    @property
    def name(self) -> str: ...

    def check_image(self, image: Image) -> Verdict: ...


def worst(verdicts: list[Verdict]) -> Verdict:
    """The first refusal with the highest score; with no refusal, the highest score."""
    return max(verdicts, key=lambda verdict: (not verdict.allowed, verdict.score))
