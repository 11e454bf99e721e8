"""What every app is made of: the App value, the page built from it, and the command line that starts it."""

from __future__ import annotations

from apps.common.app import App
from apps.common.controls import Control

__all__ = ["App", "Control"]
