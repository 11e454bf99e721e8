"""One-bit drawings from what is on the page: strokes, an uploaded drawing, or a photo whose lines are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from apps.common.uploads import open_picture, strokes
from apps.sketch import READINGS
from engine import RequestError

__all__ = ["drawing_of", "seen_by_the_model"]

_GREYS = 0.15  # more in-between tones than this are not a drawing's


def drawing_of(canvas: Mapping[str, Any], size: tuple[int, int], reading: str) -> Image.Image:
    """Dark lines on a white page, mode L, 0 or 255, `size` (width, height): strokes over what was uploaded.

    `reading` (one of READINGS) says how an uploaded picture becomes lines; a drawing that is light on dark is turned.
    Raises RequestError for a picture that cannot be read or an unknown reading.
    """
    if reading not in READINGS:
        raise RequestError("reading", f"reading: expected one of {', '.join(READINGS)}, got {reading!r}")
    ink = np.zeros(size[::-1], bool)
    if canvas.get("background"):
        picture = ImageOps.fit(open_picture(canvas, "canvas"), size, Image.Resampling.LANCZOS).convert("L")
        ink |= _lines(np.asarray(picture), reading)
    for layer in strokes(canvas, "canvas"):
        drawn = ImageOps.fit(layer, size, Image.Resampling.LANCZOS)
        ink |= np.asarray(drawn.getchannel("A")) > 127
    return Image.fromarray(np.where(ink, 0, 255).astype(np.uint8))


def seen_by_the_model(drawing: Image.Image) -> Image.Image:
    """The one-bit picture that the sampler makes of a drawing: thin strokes of large pages are eroded there."""
    from engine.models.sketch import to_lines

    lines = to_lines(drawing, drawing.height, drawing.width)[0, 0, : drawing.height, : drawing.width]
    return Image.fromarray(np.where(lines.numpy() > 0, 0, 255).astype(np.uint8))


def _lines(grey: np.ndarray, reading: str) -> np.ndarray:
    """Where an uploaded picture has lines, (H, W) bool."""
    drawn = reading == READINGS[1] or (reading == READINGS[0] and _is_drawing(grey))
    if not drawn:
        smooth = cv2.bilateralFilter(grey, 7, 50, 7)
        return cv2.dilate(cv2.Canny(smooth, 60, 140), np.ones((2, 2), np.uint8)) > 0
    ink = grey < 128
    return ~ink if ink.mean() > 0.5 else ink


def _is_drawing(grey: np.ndarray) -> bool:
    """Whether nearly every pixel is either dark or light, as in ink on paper."""
    return float(((grey > 64) & (grey < 192)).mean()) < _GREYS
