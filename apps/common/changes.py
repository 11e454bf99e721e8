"""What a run says of itself, in words for its column; and the sum of the changes that a page was told."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import gradio as gr

from apps.common import columns
from apps.common.runner import Began, Event, Failed, Loads, Stepped, Stopped, Unloaded, Withheld

__all__ = ["gathered", "head", "kept"]


def head(event: Event) -> str:
    """The line above a picture that tells of the event. Raises TypeError for one that has no words."""
    if isinstance(event, Loads):
        return columns.status(event.precision, "busy", "Loading the weights")
    if isinstance(event, Began):
        return columns.status(event.precision, "busy", "Getting ready")
    if isinstance(event, Stepped):
        return columns.step_status(event.precision, event.step)
    if isinstance(event, Stopped):
        return columns.status(event.precision, "stopped", "Stopped")
    if isinstance(event, Withheld):
        return columns.status(event.precision, "stopped", "Painted, and withheld")
    if isinstance(event, Unloaded):
        return columns.status(event.precision, "failed", "Not loaded; the reason stands at the top of the page.")
    if isinstance(event, Failed):
        return columns.status(event.precision, "failed", event.text)
    raise TypeError(f"no words for {type(event).__name__}")


def gathered(messages: Iterable[dict], seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[dict]:
    """Messages to the page, those of `seconds` joined to one; the last word of each part counts.

    For runs of a single step: a browser on the same machine that draws the first picture takes the processor from the
    second, which is being timed.
    """
    held: dict = {}
    since = clock()
    for message in messages:
        for part, change in message.items():
            before = held.get(part)
            held[part] = before | change if _is_update(before) and _is_update(change) else change
        if clock() - since >= seconds:
            yield held
            held, since = {}, clock()
    if held:
        yield held


def kept(messages: Iterable[dict], shown: dict) -> Iterator[dict]:
    """Pass messages to the page on, and leave in `shown` what their updates come to; plain values do not get lost."""
    for message in messages:
        for part, change in message.items():
            if _is_update(change):
                shown[part] = shown.get(part, gr.update()) | change
            elif part in shown:
                shown[part].pop("value", None)
        yield message


def _is_update(change: Any) -> bool:
    return isinstance(change, dict) and change.get("__type__") == "update"
