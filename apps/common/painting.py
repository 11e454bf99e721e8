"""One press of Generate, from the click to the pictures: start, run, stop, and what each puts on the page."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL.Image import Image

from apps.common import changes, columns, comparison, history, panels
from apps.common.columns import HIDDEN
from apps.common.comparison import Shot
from apps.common.runner import Desk, Event, Finished, Job, Stepped, Withheld, events
from apps.common.studio import Studio
from engine import Request, RequestError
from engine.request import MAX_SEED

if TYPE_CHECKING:
    from apps.common.shell import Page

__all__ = ["DEVICE", "PRIVATE", "Painter", "session", "wire"]

# One name for all that uses the device: Gradio then runs them one at a time, in the order they came.
DEVICE = "device"
# Seconds in which the pictures of a run of one step appear together.
TOGETHER = 0.5
# Seeds drawn for a visitor stay short enough to read out; a longer one can be typed.
DRAWN_SEEDS = 1_000_000
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def session(request: gr.Request) -> str:
    """The name of the browser page that asks."""
    return request.session_hash or "no session"


def wire(page: Page, studio: Studio) -> Callable[..., Any] | None:
    """Connect Generate, Ctrl+Enter and Stop.

    Returns, for an app that paints at every change, what makes a listener paint: `live(button.click)`.
    """
    painter = Painter(page, studio)
    asked = {*page.controls.values(), page.randomise, page.preview, page.batch}
    started = [page.message, page.generate, page.stop, page.controls["seed"], *painter.columns]
    started += [page.seen] if page.seen is not None else []
    compared, kept = page.comparison, page.history
    shown = [page.message, compared.verdict, compared.scores, compared.slider, compared.map]
    shown += [compared.legend, compared.shots, kept.gallery, kept.entries, page.last, page.last_seed]
    shown += painter.columns
    begun = gr.on(
        [page.generate.click, page.controls["prompt"].submit],  # pyright: ignore[reportAttributeAccessIssue]
        painter.start,
        inputs=asked,
        outputs=started,
        queue=False,
        **PRIVATE,
    )
    ran = begun.then(
        painter.run,
        inputs={kept.entries, compared.other, compared.amplify},
        outputs=shown,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        **PRIVATE,
    )
    ran.then(painter.rest, outputs=[page.generate, page.stop], queue=False, **PRIVATE)
    page.stop.click(painter.stop, outputs=[page.stop, page.message], queue=False, **PRIVATE)
    if studio.app.live is None or page.live is None:
        return None
    inputs = {*asked, page.live, page.drawn, kept.entries, compared.other, compared.amplify}

    def live(listen: Callable[..., Any], **how: Any) -> Any:
        outputs: list[Any] = [*{*started, *shown, page.drawn}]
        return listen(
            painter.live, inputs=inputs, outputs=outputs, concurrency_id=DEVICE, concurrency_limit=1, **how, **PRIVATE
        )

    live(page.controls[studio.app.live].change, trigger_mode="always_last")  # pyright: ignore[reportAttributeAccessIssue]
    return live


class Painter:
    """The handlers of one press of Generate: start, run, rest; and Stop."""

    def __init__(self, page: Page, studio: Studio) -> None:
        self.page = page
        self.studio = studio
        self.columns = [
            part
            for column in page.columns.values()
            for part in (column.status, column.canvas, column.image, column.reuse, column.figures)
        ]

    def start(self, data: dict, request: gr.Request) -> dict:
        """Check the values and file the job; nothing runs yet, so a mistake is told at once."""
        values = self._values(data)
        if data[self.page.randomise]:
            values["seed"] = random.randrange(DRAWN_SEEDS)
        try:
            job = self._job(values)
        except RequestError as error:
            return {self.page.message: panels.message(str(error))}
        return self._file(job, data, request)

    def _values(self, data: dict) -> dict[str, Any]:
        return {name: data[component] for name, component in self.page.controls.items()}

    def _job(self, values: dict[str, Any]) -> Job:
        return self.studio.job(values, tuple(self.page.columns))

    def _file(self, job: Job, data: dict, request: gr.Request) -> dict:
        """Leave a job for `run` to claim; what the page shows until then."""
        page = self.page
        job.preview = self.studio.previews and bool(data.get(page.preview))
        if not self.studio.desk.open(session(request), job):
            return {page.message: panels.message("A picture is being painted; Stop ends it.", "note")}
        job.seeds = _seeds(job.request.seed, data.get(page.batch) or 1)
        updates: dict = {
            page.message: "",
            page.controls["seed"]: job.values["seed"],
            page.generate: gr.update(value="Painting…", interactive=False),
            page.stop: gr.update(interactive=True),
        }
        if page.seen is not None and self.studio.app.seen is not None:
            updates[page.seen] = job.request.inputs[self.studio.app.seen[0]]
        return updates | self._waiting(job, Desk.others(job))

    def _waiting(self, job: Job, others: int = 0) -> dict:
        """Columns before their turn, behind so many runs of others."""
        behind = f" behind {others} other{'s' * (others > 1)}" if others else ""
        updates: dict = {}
        shape = job.request.width or 1, job.request.height or 1
        for precision, column in self.page.columns.items():
            updates[column.status] = columns.status(precision, "idle", f"Waiting for its turn{behind}")
            updates[column.canvas] = gr.update(value=columns.canvas(0, *shape), visible=True)
            updates[column.image] = gr.update(value=None, visible=HIDDEN)
            updates[column.reuse] = gr.update(visible=HIDDEN)
            updates[column.figures] = columns.figures(None)
        return updates

    def live(self, data: dict, request: gr.Request) -> Iterator[dict]:
        """Paint after a stroke: the same seed, and silence where there is nothing to paint."""
        if self.page.live is None or not data[self.page.live]:
            yield {self.page.message: gr.skip()}
            return
        try:
            job = self._job(self._values(data))
        except RequestError:
            yield {self.page.message: ""}
            return
        asked = _mark(job.request)
        if asked == data[self.page.drawn]:
            # The canvas tells of one change several times.
            yield {self.page.message: gr.skip()}
            return
        updates = self._file(job, data, request)
        if self.page.generate not in updates:
            yield {self.page.message: ""}
            return
        yield updates | {self.page.drawn: asked}
        shown: dict = {}
        yield from changes.kept(self._told(data, request), shown)
        yield shown | self.rest()

    def run(self, data: dict, request: gr.Request) -> Iterator[dict]:
        """Run the session's job and yield what changes on the page, each column as soon as it has something.

        The end repeats the updates. Gradio sends each message as its difference to the one before, and the page applies
        that to the very message, which it may not have shown yet: of two updates in a row the first can get lost.
        """
        shown: dict = {}
        yield from changes.kept(self._told(data, request), shown)
        if any(len(change) > 1 for change in shown.values()):
            yield shown

    def _told(self, data: dict, request: gr.Request) -> Iterator[dict]:
        """What the run changes; of a run of one step all that comes within TOGETHER in one message."""
        messages = self._run(data, request)
        return messages if self.studio.app.live is None else changes.gathered(messages, TOGETHER)

    def _run(self, data: dict, request: gr.Request) -> Iterator[dict]:
        job = self.studio.desk.claim(session(request))
        if job is None:
            # A generator that ends without a word would blank every part of the page.
            yield {self.page.message: gr.skip()}
            return
        try:
            verdict = self.studio.judge(job.request)
            if not verdict.allowed:
                yield self._refused(panels.refusal(verdict))
                return
            entries = data[self.page.history.entries]
            for number, seed in enumerate(job.seeds or (job.request.seed,), 1):
                if job.stop.is_set():
                    break
                one = job.with_seed(seed)
                if number > 1:
                    yield self._waiting(one)
                if len(job.seeds) > 1:
                    yield {
                        self.page.message: panels.message(f"Picture {number} of {len(job.seeds)}, seed {seed}.", "note")
                    }
                entries = yield from self._one(one, entries, data)
        finally:
            self.studio.desk.close(session(request), job)

    def _one(self, job: Job, entries: list[history.Entry], data: dict) -> Generator[dict, None, list[history.Entry]]:
        """The same noise in each precision. Returns the history with what was painted."""
        yield {self.page.comparison.slider: gr.update(value=None), self.page.comparison.shots: {}}
        shots: dict[str, Shot] = {}
        for event in events(job.pool or self.studio.pool, job):
            if isinstance(event, Finished):
                path = self.studio.pictures.save(event.result, self.studio.own_settings(job.values))
                shots[event.precision] = Shot(path, event.result)
                entries = history.add(entries, path, event.result, job.values)
                yield self._finished(shots, entries, job, data)
            else:
                yield self._progress(event, job)
        more = comparison.scored(self.page.comparison, shots, data[self.page.comparison.other])
        if more:
            yield more
        return entries

    def rest(self) -> dict:
        """After a run, however it ended."""
        return {
            self.page.generate: gr.update(value="Generate", interactive=True),
            self.page.stop: gr.update(value="Stop", interactive=False),
        }

    def stop(self, request: gr.Request) -> dict:
        """Set the job's stop flag; the run ends at its next step."""
        if self.studio.desk.stop(session(request)):
            return {self.page.stop: gr.update(value="Stopping…", interactive=False)}
        return {self.page.message: panels.message("Nothing is running.", "note")}

    def _progress(self, event: Event, job: Job) -> dict:
        column = self.page.columns[event.precision]
        updates: dict = {column.status: changes.head(event)}
        if isinstance(event, Stepped):
            shape = job.request.width or 1, job.request.height or 1
            updates[column.canvas] = columns.canvas(event.step.index / event.step.total, *shape, event.preview)
        if isinstance(event, Withheld):
            updates[self.page.message] = panels.withheld(event.verdict)
        return updates

    def _refused(self, card: str) -> dict:
        updates: dict = {self.page.message: card}
        for precision, column in self.page.columns.items():
            updates[column.status] = columns.status(precision, "stopped", "Not painted")
        return updates

    def _finished(self, shots: dict[str, Shot], entries: list[history.Entry], job: Job, data: dict) -> dict:
        page, results = self.page, {precision: shot.result for precision, shot in shots.items()}
        newest = list(shots)[-1]
        updates: dict = {
            page.columns[newest].status: columns.status(newest, "done", f"Done, seed {job.request.seed}"),
            page.columns[newest].canvas: gr.update(visible=HIDDEN),
            page.columns[newest].image: gr.update(value=shots[newest].path, visible=True),
            page.columns[newest].reuse: gr.update(visible=True if self.studio.app.reuse else HIDDEN),
            page.comparison.shots: dict(shots),
            page.history.gallery: gr.update(value=history.items(entries), selected_index=None),
            page.history.entries: entries,
            page.last: job.request.seed,
            page.last_seed: gr.update(value=f"Reuse seed {job.request.seed}", interactive=True),
        }
        # A column that finished before the 16-bit one learns its speed-up only now.
        for precision, result in results.items():
            updates[page.columns[precision].figures] = columns.figures(result, results)
        other, amplify = data[page.comparison.other], data[page.comparison.amplify]
        return updates | comparison.shown(page.comparison, shots, other, amplify, self.studio.pictures)


def _mark(asked: Request) -> str:
    """The same for requests of the same picture, and for no others."""
    given = {name: _bytes(value) for name, value in asked.inputs.items()}
    return hashlib.sha256(repr((replace(asked, inputs={}), sorted(given.items()))).encode()).hexdigest()


def _bytes(value: Any) -> Any:
    return value.tobytes() if isinstance(value, Image) else value


def _seeds(first: int, count: float) -> tuple[int, ...]:
    """So many seeds in a row."""
    return tuple((first + number) % (MAX_SEED + 1) for number in range(int(count)))
