"""Everything behind a page that is not on it: the app, its models, the safety checker, the pictures, the jobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from apps.common import controls, loras, styles
from apps.common.app import App
from apps.common.controls import Control
from apps.common.models import Choice
from apps.common.pictures import Pictures
from apps.common.pool import Pool
from apps.common.runner import Desk, Job
from engine import Request, RequestError
from engine.models.catalogue import ModelSpec
from safety import Checker, ImageChecker, Verdict

__all__ = ["Room", "Studio"]


@dataclasses.dataclass(frozen=True)
class Room:
    """One model that a page can run: why it is there, and its engines."""

    choice: Choice
    pool: Pool

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.choice.spec


class Studio:
    """One running app with the models its page can switch between, the first one first. All have the same precisions.

    `checker` judges prompts; `image_checker`, where there is one, every picture before it is shown.
    Starting the engines (`pool.start()`) and building the page are the caller's.
    """

    def __init__(
        self, app: App, rooms: Sequence[Room], checker: Checker, image_checker: ImageChecker | None = None
    ) -> None:
        self.app = app
        self.rooms = {room.spec.name: room for room in rooms}
        self.checker = checker
        self.image_checker = image_checker
        self.pictures = Pictures(app.slug)
        self.desk = Desk()

    @property
    def first(self) -> Room:
        """The model the page opens with."""
        return next(iter(self.rooms.values()))

    @property
    def choice(self) -> Choice:
        """The first model and why it is that one."""
        return self.first.choice

    @property
    def pool(self) -> Pool:
        """The first model's engines."""
        return self.first.pool

    def room(self, values: Mapping[str, Any]) -> Room:
        """The model that control values ask for. Raises RequestError for one that is not here."""
        name = values.get("model")
        if name is None:
            return self.first
        if not isinstance(name, str) or name not in self.rooms:
            raise RequestError("model", f"model: expected one of {', '.join(self.rooms)}, got {name!r}")
        return self.rooms[name]

    @property
    def previews(self) -> bool:
        """Whether a page can show where a run leads: not of a single step, nor what nobody has judged yet."""
        return self.app.live is None and self.image_checker is None

    @property
    def controls(self) -> tuple[Control, ...]:
        """The app's controls that any of its models has, and the choice of a model where there is one."""
        specs = [room.spec for room in self.rooms.values()]
        own = tuple(control for control in self.app.controls if any(map(control.applies, specs)))
        return own if len(specs) < 2 else (controls.model(specs), *own)

    def spec_for(self, control: Control) -> ModelSpec:
        """The first model that has the setting."""
        return next(room.spec for room in self.rooms.values() if control.applies(room.spec))

    def request(self, values: Mapping[str, Any]) -> Request:
        """Turn control values, by name, into a checked request with style and LoRA applied.

        Raises RequestError naming the field that is wrong.
        """
        spec, plain, given = self.room(values).spec, self.plain(values), self._given(values)
        inputs = self.app.prepare(given | {"width": plain.width, "height": plain.height}, spec)
        prompt = styles.apply(given.get("style"), loras.worded(given, spec, plain.prompt), given.get("style_words"))
        dressed = dataclasses.replace(plain, prompt=prompt, inputs=inputs, loras=loras.wanted(given, spec))
        return dressed.resolved(spec)

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
        ).resolved(self.room(values).spec)

    def job(self, values: Mapping[str, Any], precisions: Sequence[str]) -> Job:
        """What one press of Generate, or one call, asks for. Raises RequestError naming the field that is wrong."""
        finish = None if self.app.finish is None else partial(self.app.finish, values=self._given(values))
        judge = None if self.image_checker is None else self.image_checker.check_image
        return Job(self.request(values), precisions, values, pool=self.room(values).pool, finish=finish, judge=judge)

    def own_settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those control values that only this app has, fit to be written into a picture's file."""
        spec = self.room(values).spec
        given = self._given(values)
        return {c.name: given[c.name] for c in self.controls if c.name in given and c.recalls(given[c.name], spec)}

    def _given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A value for each of the app's controls: the given one, else the default; what the model lacks is left out."""
        spec = self.room(values).spec
        having = [control for control in self.app.controls if control.applies(spec)]
        lacking = {control.name for control in self.app.controls} - {control.name for control in having}
        defaults = {control.name: control.default(spec) for control in having}
        return defaults | {n: value for n, value in values.items() if value is not None and n not in lacking}

    def judge(self, request: Request) -> Verdict:
        """The safety checker's answer on the final prompt; where there is none, there is nothing to judge."""
        if not request.prompt.strip():
            return Verdict(True, None, 0.0, "none", "There is no prompt to judge.")
        return self.checker.check(request.prompt)
