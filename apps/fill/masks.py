"""Masks: where to paint anew (white), from strokes or from a file; and the way back into the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from apps.common.uploads import open_picture, strokes
from apps.fill import SIDES
from engine import RequestError

__all__ = ["mask_of", "paste_back", "widened"]


def mask_of(canvas: Mapping[str, Any], file: Any, size: tuple[int, int], grow: int, invert: bool) -> Image.Image:
    """The mask at `size` (width, height), mode L, white where to paint: the strokes on the canvas and `file` together.

    `grow` widens it by so many pixels; `invert` turns it over first. Raises RequestError when it is empty.
    """
    white = np.zeros(size[::-1], np.uint8)
    for layer in strokes(canvas, "canvas"):
        white |= np.asarray(ImageOps.fit(layer, size).getchannel("A")) > 127
    if file:
        given = ImageOps.fit(open_picture(file, "mask"), size, Image.Resampling.NEAREST).convert("L")
        white |= np.asarray(given) > 127
    if invert:
        white = 1 - white
    if grow:
        white = cv2.dilate(white, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * grow + 1, 2 * grow + 1)))
    if not white.any():
        raise RequestError("canvas", "canvas: nothing is marked; paint over what shall change, or upload a mask")
    return Image.fromarray(255 * white)


def widened(
    picture: Image.Image, size: tuple[int, int], share: float, side: str, overlap: int
) -> tuple[Image.Image, Image.Image]:
    """`picture` on a larger page of `size` (width, height), and the mask of what is to be painted around it, mode L.

    It keeps its shape and takes at most `share` (0 to 1) of each side of the page; it lies in the middle or at `side`
    (one of SIDES). The mask reaches `overlap` pixels into it where new and old meet, but never over half of it.
    Raises RequestError for another side, and where the picture would fill the page.
    """
    if side not in SIDES:
        raise RequestError("side", f"side: expected one of {', '.join(SIDES)}, got {side!r}")
    small = ImageOps.contain(picture, (max(8, round(size[0] * share)), max(8, round(size[1] * share))))
    free = size[0] - small.width, size[1] - small.height
    if not any(free):
        raise RequestError("share", "share: the picture fills the page; let it take less, or choose another shape")
    left = {"Left": 0, "Right": free[0]}.get(side, free[0] // 2)
    top = {"Top": 0, "Bottom": free[1]}.get(side, free[1] // 2)
    page = Image.new("RGB", size, "grey")
    page.paste(small, (left, top))
    across, down = min(overlap, small.width // 4), min(overlap, small.height // 4)
    kept = (
        left + across * (left > 0),
        top + down * (top > 0),
        left + small.width - across * (left + small.width < size[0]),
        top + small.height - down * (top + small.height < size[1]),
    )
    mask = Image.new("L", size, 255)
    mask.paste(0, kept)
    return page, mask


def paste_back(painted: Image.Image, picture: Image.Image, mask: Image.Image, feather: float) -> Image.Image:
    """`painted` inside the mask, `picture` outside, a soft seam of `feather` pixels around the mask.

    Farther away every pixel is that of `picture`, bit for bit. All three have one size.
    """
    away = cv2.distanceTransform((np.asarray(mask) < 128).astype(np.uint8), cv2.DIST_L2, 5)
    share = np.clip(1 - away / max(feather, 1e-6), 0, 1)[..., None]
    new, old = (np.asarray(image, np.float32) for image in (painted, picture))
    return Image.fromarray((old + share * (new - old) + 0.5).astype(np.uint8))
