"""The programming interface: one endpoint, /generate, typed and documented from the controls; also an MCP tool."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import gradio as gr

from apps.common.runner import Failed, Finished, Job, Withheld, events
from apps.common.studio import Studio
from engine import RequestError

__all__ = ["add", "endpoint"]


def add(studio: Studio, name: str = "generate") -> None:
    """Add /generate (or /`name`) to the page being built. It shares the device's queue with the page's own runs."""
    function = endpoint(studio)
    function.__name__ = name
    gr.api(function, api_name=name, concurrency_id="device", concurrency_limit=1)


def endpoint(studio: Studio) -> Callable[..., tuple[dict, dict]]:
    """A function `generate(*, prompt, seed, ..., precision)` whose signature is made from the app's controls."""
    precisions = studio.pool.precisions

    def generate(*given: Any) -> tuple[dict, dict]:
        values = dict(zip(signature.parameters, given, strict=False))
        precision = values.pop("precision", precisions[-1])
        try:
            if precision not in precisions:
                raise RequestError(
                    "precision", f"precision: expected one of {', '.join(precisions)}, got {precision!r}"
                )
            job = studio.job(values, (precision,))
        except RequestError as error:
            raise gr.Error(str(error), print_exception=False) from error
        verdict = studio.judge(job.request)
        if not verdict.allowed:
            raise gr.Error(f"The prompt was refused: {verdict.reason}", print_exception=False)
        return _answer(studio, job)

    signature = _signature(studio)
    generate.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    generate.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    generate.__annotations__["return"] = signature.return_annotation
    generate.__doc__ = _document(studio)
    return generate


def _answer(studio: Studio, job: Job) -> tuple[dict, dict]:
    for event in events(job.pool or studio.pool, job):
        if isinstance(event, Finished):
            own = studio.own_settings(job.values)
            path = studio.pictures.save(event.result, own)
            facts = {"settings": event.result.settings(own), "measurements": event.result.measurements()}
            return gr.FileData(path=path, mime_type="image/png").model_dump(), facts
        if isinstance(event, Withheld):
            raise gr.Error(event.verdict.reason, print_exception=False)
        if isinstance(event, Failed):
            raise gr.Error(event.text, print_exception=False)
    raise gr.Error("The run ended without a picture.", print_exception=False)


def _signature(studio: Studio) -> inspect.Signature:
    any_order = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = []
    # Python wants what has no default first; the page may have another order.
    for control in sorted(studio.controls, key=lambda control: control.name != "prompt"):
        default = inspect.Parameter.empty if control.name == "prompt" else control.default(studio.spec_for(control))
        parameters.append(inspect.Parameter(control.name, any_order, default=default, annotation=control.kind))
    # A Literal of one value has no list of choices to show.
    last = studio.pool.precisions[-1]
    kind = Literal[studio.pool.precisions] if len(studio.pool.precisions) > 1 else str  # pyright: ignore
    parameters.append(inspect.Parameter("precision", any_order, default=last, annotation=kind))
    return inspect.Signature(parameters, return_annotation=tuple[dict, dict])


def _titles(studio: Studio) -> str:
    return " or ".join(room.spec.title for room in studio.rooms.values())


def _document(studio: Studio) -> str:
    lines = [f"{studio.app.title}: paint one picture with {_titles(studio)}, in one precision.", "", "Args:"]
    lines += [f"    {control.name}: {control.describe}" for control in studio.controls]
    lines += [f"    precision: One of {', '.join(studio.pool.precisions)}.", "", "Returns:"]
    lines += ["    The picture, a PNG file that carries its settings.", "    Settings and measurements of the run."]
    return "\n".join(lines)
