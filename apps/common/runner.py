"""Runs a request in each precision, one after the other, in a worker thread that feeds a queue.

The page (or the API) reads events from the queue as they happen; closing the reader stops the worker at its next step.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from apps.common.pool import LoadFailed, Pool
from apps.common.trouble import sentence
from engine import Cancelled, EngineError, Request, Result, Step

if TYPE_CHECKING:
    from PIL.Image import Image

    from safety import Verdict

__all__ = [
    "Began",
    "Desk",
    "Event",
    "Failed",
    "Finished",
    "Job",
    "Loads",
    "Stepped",
    "Stopped",
    "Unloaded",
    "Withheld",
    "events",
    "judged",
    "on_device",
]

# Seconds between two reports of progress. Each costs the page some processor time, which on a small machine is time
# taken from the run being measured.
STEP_INTERVAL = 0.2

log = logging.getLogger("nibble")


@dataclass(frozen=True)
class Event:
    """Something happened to one precision."""

    precision: str


class Loads(Event):
    """Its engine is still being loaded."""


class Began(Event):
    """Its run has begun."""


class Stopped(Event):
    """It was stopped, or never begun because of a stop."""


@dataclass(frozen=True)
class Stepped(Event):
    """A denoising step is done; `preview` is a small picture of where it leads, if that was asked for."""

    step: Step
    preview: Image | None = None


@dataclass(frozen=True)
class Finished(Event):
    """Its picture is ready."""

    result: Result


@dataclass(frozen=True)
class Failed(Event):
    """It failed; `text` is one sentence."""

    text: str


class Unloaded(Failed):
    """Its engine could not be loaded, which the page says at its top."""


@dataclass(frozen=True)
class Withheld(Event):
    """It was painted, and the picture checker refused it; the picture is kept nowhere."""

    verdict: Verdict


@dataclass
class Job:
    """One press of Generate: what to run, and the flag that stops it."""

    request: Request
    precisions: Sequence[str]
    values: Mapping[str, Any]
    stop: threading.Event = field(default_factory=threading.Event)
    claimed: bool = False
    pool: Pool | None = None
    preview: bool = False
    seeds: tuple[int, ...] = ()
    finish: Callable[[Image, Request], Image] | None = None
    judge: Callable[[Image], Verdict] | None = None

    def with_seed(self, seed: int) -> Job:
        """The same job from other noise; Stop ends both."""
        request = replace(self.request, seed=seed)
        return replace(self, request=request, values={**self.values, "seed": seed})


class _Feed:
    """A queue in which an unread step gives way to a newer one: a slow reader sees the present, not a backlog."""

    def __init__(self) -> None:
        self._events: deque[Event | None] = deque()
        self._filled = threading.Condition()

    def put(self, event: Event | None) -> None:
        with self._filled:
            if isinstance(event, Stepped) and self._events and isinstance(self._events[-1], Stepped):
                self._events.pop()
            self._events.append(event)
            self._filled.notify()

    def get(self) -> Event | None:
        with self._filled:
            self._filled.wait_for(lambda: self._events)
            return self._events.popleft()


def events(pool: Pool, job: Job) -> Iterator[Event]:
    """Yield what happens while `job` runs. Closing the iterator stops the job at its next step."""
    return on_device(pool, job) if pool.lent is None else pool.lent(job)


def on_device(pool: Pool, job: Job) -> Iterator[Event]:
    """The same on this process's own device."""
    feed = _Feed()
    threading.Thread(target=_work, args=(pool, job, feed), name="run", daemon=True).start()
    try:
        while (event := feed.get()) is not None:
            yield event
    except BaseException:
        # The reader has gone before the end.
        job.stop.set()
        raise


def _work(pool: Pool, job: Job, feed: _Feed) -> None:
    try:
        for precision in job.precisions:
            feed.put(_one(pool, job, precision, feed))
    finally:
        feed.put(None)


def _one(pool: Pool, job: Job, precision: str, feed: _Feed) -> Event:
    try:
        if pool.state(precision).state != "ready":
            feed.put(Loads(precision))
        engine = pool.get(precision, job.stop.is_set)
        with pool.device:
            if engine is None or job.stop.is_set():
                return Stopped(precision)
            feed.put(Began(precision))
            result = engine.run(
                job.request, on_step=_reporter(precision, feed, job.preview), should_stop=job.stop.is_set
            )
        # Two columns can hold the same precision (INT4 with 8-bit and with 4-bit numbers): the column's name tells them
        # apart, in files and in words.
        result = replace(result, precision=precision)
        if job.finish is not None:
            result = replace(result, image=job.finish(result.image, result.request))
        return judged(Finished(precision, result), job)
    except Cancelled:
        return Stopped(precision)
    except LoadFailed as error:
        return Unloaded(precision, str(error))
    except EngineError as error:  # raised on purpose, it says all there is to say
        return Failed(precision, sentence(error))
    except Exception as error:
        log.exception("the run in %s failed", precision)
        return Failed(precision, sentence(error))


def judged(event: Event, job: Job) -> Event:
    """The event, or where it brings a picture that the job's judge refuses, that it was withheld."""
    if job.judge is None or not isinstance(event, Finished):
        return event
    verdict = job.judge(event.result.image)
    return event if verdict.allowed else Withheld(event.precision, verdict)


def _reporter(precision: str, feed: _Feed, preview: bool) -> Callable[[Step], None]:
    """A listener to steps that passes on no more than a page can use."""
    last = -STEP_INTERVAL

    def report(step: Step) -> None:
        nonlocal last
        if step.seconds - last >= STEP_INTERVAL:
            last = step.seconds
            picture = step.preview() if preview and step.preview is not None else None
            feed.put(Stepped(precision, replace(step, preview=None), picture))

    return report


class Desk:
    """At most one job a browser session: opened by the click, claimed by the run, stopped by the Stop button."""

    _all: ClassVar[WeakSet[Desk]] = WeakSet()

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        Desk._all.add(self)

    @classmethod
    def others(cls, job: Job) -> int:
        """How many jobs beside this one the pages of this process have been given and not finished."""
        return sum(other is not job for desk in list(cls._all) for other in list(desk._jobs.values()))

    def open(self, session: str, job: Job) -> bool:
        """File a job; False when that session already has one."""
        with self._lock:
            return self._jobs.setdefault(session, job) is job

    def claim(self, session: str) -> Job | None:
        """Hand the session's job to the one who runs it; None when there is none or it has been handed out."""
        with self._lock:
            job = self._jobs.get(session)
            if job is None or job.claimed:
                return None
            job.claimed = True
            return job

    def stop(self, session: str) -> bool:
        """Ask the session's job to stop; False when there is none."""
        with self._lock:
            job = self._jobs.get(session)
        if job is not None:
            job.stop.set()
        return job is not None

    def close(self, session: str, job: Job | None = None) -> None:
        """Forget the session's job (that very one, when given) and stop it if it still runs."""
        with self._lock:
            if job is None or self._jobs.get(session) is job:
                job = self._jobs.pop(session, None)
        if job is not None:
            job.stop.set()
