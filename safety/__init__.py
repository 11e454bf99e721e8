"""Judges prompts and pictures; knows nothing of user interfaces or diffusion models.

    from safety import check, load_checker
    verdict = check("a red cube", load_checker("words"))
    if not verdict.allowed: show(verdict.reason)

Nothing here changes a prompt. A checker that cannot be loaded raises SafetyError; it is never skipped.
"""

from __future__ import annotations

from safety.registry import CHECKERS, IMAGE_CHECKERS, check, check_image, load_checker, load_image_checker
from safety.verdict import Checker, ImageChecker, SafetyError, Verdict

__all__ = [
    "CHECKERS",
    "IMAGE_CHECKERS",
    "Checker",
    "ImageChecker",
    "SafetyError",
    "Verdict",
    "check",
    "check_image",
    "load_checker",
    "load_image_checker",
]
