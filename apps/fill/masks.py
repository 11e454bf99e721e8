"""Masks: where to paint anew (white), from strokes or from a file; and the way back into the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from apps.common.uploads import open_picture, open_upload
from engine import RequestError

__all__ = ["FEATHER", "mask_of", "paste_back"]

FEATHER = 6  # pixels around the mask in which the new picture passes into the old one


def mask_of(canvas: Mapping[str, Any], file: Any, size: tuple[int, int], grow: int, invert: bool) -> Image.Image:
    """The mask at `size` (width, height), mode L, white where to paint: the strokes on the canvas and `file` together.

    `grow` widens it by so many pixels; `invert` turns it over first. Raises RequestError when it is empty.
    """
    white = np.zeros(size[::-1], np.uint8)
    for layer in canvas.get("layers") or ():
        drawn = ImageOps.fit(open_upload(layer, "canvas").convert("RGBA"), size).getchannel("A")
        white |= np.asarray(drawn) > 127
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


def paste_back(painted: Image.Image, picture: Image.Image, mask: Image.Image) -> Image.Image:
    """`painted` inside the mask, `picture` outside, a soft seam of FEATHER pixels around the mask.

    Farther away every pixel is that of `picture`, bit for bit. All three have one size.
    """
    away = cv2.distanceTransform((np.asarray(mask) < 128).astype(np.uint8), cv2.DIST_L2, 5)
    share = np.clip(1 - away / FEATHER, 0, 1)[..., None]
    new, old = (np.asarray(image, np.float32) for image in (painted, picture))
    return Image.fromarray((old + share * (new - old) + 0.5).astype(np.uint8))
