"""Everything behind a page that is not on it: the app, its engines, the safety checker, the pictures, the jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from apps.common import styles
from apps.common.app import App
from apps.common.controls import Control
from apps.common.models import Choice
from apps.common.pictures import Pictures
from apps.common.pool import Pool
from apps.common.runner import Desk, Job
from engine import Request
from safety import Checker, Verdict

__all__ = ["Studio"]


class Studio:
    """One running app. Starting the engines (`pool.start()`) and building the page are the caller's."""

    def __init__(self, app: App, choice: Choice, pool: Pool, checker: Checker) -> None:
        self.app = app
        self.choice = choice
        self.pool = pool
        self.checker = checker
        self.pictures = Pictures(app.slug)
        self.desk = Desk()

    @property
    def controls(self) -> tuple[Control, ...]:
        """The app's controls that the model in use has."""
        return tuple(control for control in self.app.controls if control.applies(self.choice.spec))

    def request(self, values: Mapping[str, Any]) -> Request:
        """Turn control values, by name, into a checked request with the style applied.

        Raises RequestError naming the field that is wrong.
        """
        plain, given = self.plain(values), self._given(values)
        inputs = self.app.prepare(given | {"width": plain.width, "height": plain.height}, self.choice.spec)
        dressed = dataclasses.replace(plain, prompt=styles.apply(given.get("style"), plain.prompt), inputs=inputs)
        return dressed.resolved(self.choice.spec)

    def plain(self, values: Mapping[str, Any]) -> Request:
        """The request as it stands in the controls, checked, without style and without the app's own inputs."""
        given = self._given(values)
        return Request(
            prompt=given["prompt"],
            seed=given.get("seed", 0),
            steps=given.get("steps"),
            guidance=given.get("guidance"),
            width=given.get("width"),
            height=given.get("height"),
        ).resolved(self.choice.spec)

    def job(self, values: Mapping[str, Any], precisions: Sequence[str]) -> Job:
        """What one press of Generate, or one call, asks for. Raises RequestError naming the field that is wrong."""
        return Job(self.request(values), precisions, values, finish=self.app.finish)

    def _given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each of the app's controls: the given one, else the default."""
        defaults = {control.name: control.default(self.choice.spec) for control in self.app.controls}
        return defaults | {name: value for name, value in values.items() if value is not None}

    def judge(self, request: Request) -> Verdict:
        """The safety checker's answer on the final prompt; where there is none, there is nothing to judge."""
        if not request.prompt.strip():
            return Verdict(True, None, 0.0, "none", "There is no prompt to judge.")
        return self.checker.check(request.prompt)
