"""A small detector for rendered scenes: it says what a picture shows, so that generated pictures can be scored."""

from __future__ import annotations

from zoo.probe.judge import Verdict, judge
from zoo.probe.model import Detection, Probe

__all__ = ["Detection", "Probe", "Verdict", "judge"]
