"""What happens on the page: every handler, wired by component and matched by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from apps.common import columns, comparison, controls, history, panels, pictures, recalling
from apps.common.comparison import Shot
from apps.common.runner import Began, Event, Failed, Finished, Job, Loads, Stepped, Stopped, events
from apps.common.studio import Studio
from engine import RequestError
from engine.request import MAX_SEED

if TYPE_CHECKING:
    from apps.common.shell import Page

__all__ = ["DEVICE", "wire"]

# One name for all that uses the device: Gradio then runs them one at a time, in the order they came.
DEVICE = "device"
PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


def wire(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    """Connect every component of the page."""
    _wire_run(page, studio)
    _wire_loading(demo, page, studio)
    _wire_settings(page, studio)
    _wire_comparison(page, studio)
    _wire_history(page, studio)

    def leave(request: gr.Request) -> None:
        studio.desk.close(_session(request))

    demo.unload(leave)


def _session(request: gr.Request) -> str:
    return request.session_hash or "api"


def _wire_run(page: Page, studio: Studio) -> None:
    painter = _Painter(page, studio)
    asked = {*page.controls.values(), page.randomise}
    started = [page.message, page.generate, page.stop, page.controls["seed"], *painter.columns]
    shown = [page.message, page.comparison.box, page.comparison.verdict, page.comparison.slider, page.comparison.map]
    shown += [page.comparison.legend, page.comparison.shots, page.history.box, page.history.gallery]
    shown += [page.history.entries, page.last, page.last_seed, *painter.columns]
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
        inputs={page.history.entries, page.comparison.other, page.comparison.amplify},
        outputs=shown,
        concurrency_id=DEVICE,
        concurrency_limit=1,
        **PRIVATE,
    )
    ran.then(painter.rest, outputs=[page.generate, page.stop], queue=False, **PRIVATE)
    page.stop.click(painter.stop, outputs=[page.stop, page.message], queue=False, **PRIVATE)


class _Painter:
    """The handlers of one press of Generate: start, run, rest; and Stop."""

    def __init__(self, page: Page, studio: Studio) -> None:
        self.page = page
        self.studio = studio
        self.columns = [part for column in page.columns.values() for part in (column.status, column.image, column.figures)]

    def start(self, data: dict, request: gr.Request) -> dict:
        """Check the values and file the job; nothing runs yet, so a mistake is told at once."""
        page = self.page
        values = {name: data[component] for name, component in page.controls.items()}
        if data[page.randomise]:
            values["seed"] = random.randrange(MAX_SEED + 1)
        try:
            job = Job(self.studio.request(values), self.studio.pool.precisions, values)
        except RequestError as error:
            return {page.message: panels.message(str(error))}
        if not self.studio.desk.open(_session(request), job):
            return {page.message: panels.message("A picture is being painted; Stop ends it.", "note")}
        updates: dict = {
            page.message: "",
            page.controls["seed"]: values["seed"],
            page.generate: gr.update(value="Painting…", interactive=False),
            page.stop: gr.update(interactive=True),
        }
        for precision, column in page.columns.items():
            updates[column.status] = columns.status(precision, "idle", "Waiting for its turn")
            updates[column.image] = None
            updates[column.figures] = columns.figures(None)
        return updates

    def run(self, data: dict, request: gr.Request) -> Iterator[dict]:
        """Run the session's job and yield what changes on the page, each column as soon as it has something."""
        job = self.studio.desk.claim(_session(request))
        if job is None:
            return
        try:
            verdict = self.studio.judge(job.request)
            if not verdict.allowed:
                yield self._refused(panels.refusal(verdict))
                return
            yield {self.page.comparison.box: gr.update(visible=False), self.page.comparison.shots: {}}
            shots: dict[str, Shot] = {}
            entries = data[self.page.history.entries]
            for event in events(self.studio.pool, job):
                if isinstance(event, Finished):
                    path = self.studio.pictures.save(event.result)
                    shots[event.precision] = Shot(path, event.result)
                    entries = history.add(entries, path, event.result, job.values)
                    yield self._finished(shots, entries, job, data)
                else:
                    yield {self.page.columns[event.precision].status: _head(event)}
        finally:
            self.studio.desk.close(_session(request), job)

    def rest(self) -> dict:
        """After a run, however it ended."""
        return {
            self.page.generate: gr.update(value="Generate", interactive=True),
            self.page.stop: gr.update(value="Stop", interactive=False),
        }

    def stop(self, request: gr.Request) -> dict:
        """Set the job's stop flag; the run ends at its next step."""
        if self.studio.desk.stop(_session(request)):
            return {self.page.stop: gr.update(value="Stopping…", interactive=False)}
        return {self.page.message: panels.message("Nothing is running.", "note")}

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
            page.columns[newest].image: shots[newest].path,
            page.comparison.shots: dict(shots),
            page.history.box: gr.update(visible=True),
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


def _head(event: Event) -> str:
    if isinstance(event, Loads):
        return columns.status(event.precision, "busy", "Loading the weights")
    if isinstance(event, Began):
        return columns.status(event.precision, "busy", "Getting ready")
    if isinstance(event, Stepped):
        return columns.step_status(event.precision, event.step)
    if isinstance(event, Stopped):
        return columns.status(event.precision, "stopped", "Stopped")
    if isinstance(event, Failed):
        return columns.status(event.precision, "failed", event.text)
    raise TypeError(f"no words for {type(event).__name__}")


def _wire_loading(demo: gr.Blocks, page: Page, studio: Studio) -> None:
    clock = gr.Timer(0.7, active=True)

    def look() -> tuple[Any, Any]:
        return panels.banner(studio.choice, studio.pool, studio.app), gr.Timer(active=not studio.pool.settled)

    for event in (demo.load, clock.tick):
        event(look, outputs=[page.banner, clock], queue=False, **PRIVATE)


def _wire_settings(page: Page, studio: Studio) -> None:
    spec, parts = studio.choice.spec, page.controls
    for button, example in zip(page.examples, studio.app.examples, strict=True):
        chosen = [parts[name] for name in example if name in parts]
        button.click(
            lambda example=example: [value for name, value in example.items() if name in parts],
            outputs=chosen, queue=False, **PRIVATE,
        )  # fmt: skip
    page.last_seed.click(
        lambda seed: (seed, False), inputs=[page.last], outputs=[parts["seed"], page.randomise], queue=False, **PRIVATE
    )
    # A seed typed by hand is meant to be used.
    parts["seed"].input(lambda: False, outputs=[page.randomise], queue=False, **PRIVATE)  # pyright: ignore
    if page.aspect is not None:
        sides = [parts["width"], parts["height"]]
        page.aspect.input(
            lambda aspect: controls.aspect_size(spec, aspect), inputs=[page.aspect], outputs=sides, queue=False, **PRIVATE
        )
        for side in sides:
            side.input(lambda: None, outputs=[page.aspect], queue=False, **PRIVATE)  # pyright: ignore

    def recall(path: str) -> dict:
        try:
            settings = pictures.recall(path)
        except pictures.NotOurs as error:
            return {page.message: panels.message(str(error))}
        values, note = recalling.fit(settings, studio)
        return _filled(page, values) | {page.message: panels.message(note, "note")}

    page.recall.upload(
        recall, inputs=[page.recall], outputs=[page.message, page.randomise, *parts.values()], queue=False, **PRIVATE
    )


def _filled(page: Page, values: dict[str, Any]) -> dict:
    return {page.controls[name]: value for name, value in values.items() if name in page.controls} | {page.randomise: False}


def _wire_comparison(page: Page, studio: Studio) -> None:
    parts = page.comparison

    def redraw(shots: dict[str, Shot], other: str, amplify: float) -> dict:
        return comparison.shown(parts, shots, other, amplify, studio.pictures)

    def remap(shots: dict[str, Shot], other: str, amplify: float) -> tuple[Any, str]:
        if len(shots) < 2:
            return gr.skip(), comparison.legend(amplify)
        drawn = redraw(shots, other, amplify)
        return drawn[parts.map], drawn[parts.legend]

    state: Any = [parts.shots, parts.other, parts.amplify]
    shown = [parts.box, parts.verdict, parts.slider, parts.map, parts.legend]
    parts.other.input(redraw, inputs=state, outputs=shown, queue=False, **PRIVATE)
    parts.amplify.release(remap, inputs=state, outputs=[parts.map, parts.legend], queue=False, **PRIVATE)


def _wire_history(page: Page, studio: Studio) -> None:
    kept = page.history

    def select(event: gr.SelectData) -> tuple[Any, Any]:
        return event.index, gr.update(interactive=True)

    def reuse(entries: list[history.Entry], index: int | None) -> dict:
        if index is None or not 0 <= index < len(entries):
            return {page.message: panels.message("Choose a picture of this session first.", "note")}
        return _filled(page, dict(entries[index].values)) | {page.message: ""}

    def clear() -> tuple[Any, ...]:
        return [], [], None, gr.update(interactive=False), gr.update(visible=False)

    kept.gallery.select(select, outputs=[kept.selected, kept.reuse], queue=False, **PRIVATE)
    kept.reuse.click(
        reuse, inputs=[kept.entries, kept.selected], outputs=[page.message, page.randomise, *page.controls.values()],
        queue=False, **PRIVATE,
    )  # fmt: skip
    emptied = [kept.entries, kept.gallery, kept.selected, kept.reuse, kept.box]
    kept.clear.click(clear, outputs=emptied, queue=False, **PRIVATE)
