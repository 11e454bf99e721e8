"""The checkers by name, and the two functions most callers need."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from safety.verdict import Checker, ImageChecker, SafetyError, Verdict
from safety.words import WordChecker

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CHECKERS", "IMAGE_CHECKERS", "check", "check_image", "load_checker", "load_image_checker"]

CHECKERS = {
    "words": "a local list of words and phrases, English, no weights",
    "qwen3guard": "Qwen3Guard-Gen 0.6B, 119 languages, 1.5 GB",
    "shieldgemma": "ShieldGemma 2B, English, 5.2 GB, licence to accept",
    "off": "no check at all",
}
IMAGE_CHECKERS = {"nsfw": "a ViT classifier of sexual content, 0.35 GB"}


class _Off:
    """Allows everything, and says so in each verdict."""

    name = "off"

    def check(self, prompt: str) -> Verdict:
        return Verdict(True, None, 0.0, self.name, "The safety check is switched off.")


@cache
def _words() -> WordChecker:
    return WordChecker()


def load_checker(name: str = "words", *, device: str = "auto", path: str | None = None) -> Checker:
    """Load a prompt checker.

    `name` is a key of CHECKERS. `device` and `path` matter to the models only: "auto" takes CUDA where it is;
    `path` is a local folder or a hub id that replaces the default one.

    Raises SafetyError when the name is unknown or the model cannot be loaded.
    """
    if name == "words":
        return _words()
    if name == "off":
        return _Off()
    # The models pull in transformers, which takes seconds to import; the word list must not pay for it.
    if name == "qwen3guard":
        from safety.qwen3guard import Qwen3Guard

        return Qwen3Guard.load(path, device=device)
    if name == "shieldgemma":
        from safety.shieldgemma import ShieldGemma

        return ShieldGemma.load(path, device=device)
    raise SafetyError(f"There is no safety checker {name!r}; choose one of {', '.join(CHECKERS)}.")


def load_image_checker(name: str = "nsfw", *, device: str = "auto", path: str | None = None) -> ImageChecker:
    """Load a picture checker, a key of IMAGE_CHECKERS; arguments and errors as for `load_checker`."""
    if name == "nsfw":
        from safety.nsfw import NsfwClassifier

        return NsfwClassifier.load(path, device=device)
    raise SafetyError(f"There is no picture checker {name!r}; choose one of {', '.join(IMAGE_CHECKERS)}.")


def check(prompt: str, checker: Checker | None = None) -> Verdict:
    """Judge `prompt` with `checker`, the word list by default. Pass the final prompt, after styles and templates."""
    return (checker or _words()).check(prompt)


def check_image(image: Image, checker: ImageChecker) -> Verdict:
    """Judge a picture. There is no default: every picture checker needs weights."""
    return checker.check_image(image)
