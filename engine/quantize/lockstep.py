"""Run several functions side by side, all of them stopping at the same places.

A pipeline runs its own loop over steps and its own loop over blocks. To take many of them through a block while that
block is in memory, each runs in a thread that stops where it needs the block, until all of them are there. Only one
thread runs at a time, so the order of all that happens is fixed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.errors import Cancelled

__all__ = ["ask", "run_together"]

Serve = Callable[[int, list[tuple[int, Any]]], list[Any]]
_HERE = threading.local()
_STOP = object()


def ask(place: int, question: Any) -> Any:
    """Called within a task: hand `question` over at `place` and wait for the answer."""
    return _HERE.task.ask(place, question)


def run_together(works: Sequence[Callable[[], None]], serve: Serve) -> None:
    """Run all `works` to their end; `serve` answers (place, [(number of the task, question), ...]) in that order.

    Of several places that tasks have reached, the lowest is served first. What a task or `serve` raises ends all.
    """
    tasks = [_Task(number, work) for number, work in enumerate(works)]
    waiting: dict[int, tuple[int, Any]] = {}
    try:
        for task in tasks:
            task.start()
            _hear(task, waiting)
        while waiting:
            place = min(where for where, _ in waiting.values())
            questions = [(number, what) for number, (where, what) in waiting.items() if where == place]
            for number, _ in questions:
                del waiting[number]
            answers = serve(place, questions)
            for (number, _), answer in zip(questions, answers, strict=True):
                tasks[number].answers.put(answer)
                _hear(tasks[number], waiting)
    finally:
        for task in tasks:
            task.answers.put(_STOP)
        for task in tasks:
            if task.ident is not None:
                task.join()


def _hear(task: _Task, waiting: dict[int, tuple[int, Any]]) -> None:
    """Let a task run until it asks again or ends."""
    said = task.words.get()
    if isinstance(said, BaseException):
        raise said
    if said is not None:
        waiting[task.number] = said


class _Task(threading.Thread):
    """A thread that says (place, question), an exception, or None when it is done, and then waits for an answer."""

    def __init__(self, number: int, work: Callable[[], None]) -> None:
        super().__init__(daemon=True, name=f"task {number}")
        self.number, self.work = number, work
        self.words: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        _HERE.task = self
        try:
            with torch.inference_mode():  # which torch keeps for each thread apart
                self.work()
        except BaseException as error:
            self.words.put(error)
        else:
            self.words.put(None)

    def ask(self, place: int, question: Any) -> Any:
        self.words.put((place, question))
        answer = self.answers.get()
        if answer is _STOP:
            raise Cancelled("another task ended the run")
        return answer
