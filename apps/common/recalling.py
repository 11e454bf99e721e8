"""From the settings in a PNG to control values this page can take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apps.common.studio import Studio
from apps.common.styles import NONE
from engine import RequestError

__all__ = ["fit"]


def fit(settings: Mapping[str, Any], studio: Studio) -> tuple[dict[str, Any], str]:
    """Return the settings this page's controls can take, by name, and a sentence on what was left out.

    The prompt in a picture is the final one, style included, so the style is set to none. A value that this model's
    limits do not admit is left out, never bent.
    """
    by_name = {control.name: control for control in studio.controls}
    values: dict[str, Any] = {}
    left: list[str] = []
    made = {"model": settings["model"]} if settings.get("model") in studio.rooms else {}
    spec = studio.room(made).spec
    own = settings.get("controls")
    for name, value in (own if isinstance(own, Mapping) else {}).items():
        if name in by_name and by_name[name].applies(spec):
            if by_name[name].recalls(value, spec):
                values[name] = value
            else:
                left.append(name)
    for name, value in settings.items():
        if name not in by_name or value is None:
            continue
        try:
            studio.plain({"prompt": "x", **made, name: value})
        except (RequestError, TypeError):
            left.append(name)
        else:
            values[name] = value
    if "style" in by_name and "prompt" in values:
        values |= {"style": NONE, "style_words": ""}
    return values, _note(settings, left, spec.name)


def _note(settings: Mapping[str, Any], left: list[str], model: str) -> str:
    note = "Settings recalled from the picture."
    made = settings.get("model")
    if isinstance(made, str) and made != model:
        note += f" It was made with {made}; this page runs {model}, so the picture will differ."
    if left:
        note += f" Out of this model's range and left as they were: {', '.join(left)}."
    return note
