"""Pictures that visitors give: opened once, turned upright, and brought to plain RGB, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from engine import RequestError

__all__ = ["MAX_PIXELS", "open_picture"]

MAX_PIXELS = 64_000_000


def open_picture(value: Any, name: str) -> Image.Image:
    """The picture in RGB, EXIF rotation applied, see-through parts on white.

    `value` is what the page or the interface hands over: a path in the upload folder, or a mapping with a "path".
    Raises RequestError naming `name` when there is none, or when the file is no picture, damaged or too large.
    """
    if not value:
        raise RequestError(name, f"{name}: expected a picture to start from, got none; upload one or try an example")
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str | Path) or not _uploaded(Path(path)):
        raise RequestError(name, f"{name}: expected an uploaded picture file, got {value!r:.80}")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                limit = MAX_PIXELS // 1_000_000
                raise RequestError(
                    name, f"{name}: expected at most {limit} million pixels, got {file.width} x {file.height}"
                )
            return _plain(ImageOps.exif_transpose(file))
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(name, f"{name}: the picture is too large to open") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(name, f"{name}: the file could not be read as a picture; it may be damaged") from error


def _uploaded(path: Path) -> bool:
    """Whether the file came through an upload: no other file of this machine may be opened from outside."""
    from gradio.utils import get_upload_folder

    return path.resolve().is_relative_to(Path(get_upload_folder()).resolve())


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return picture.convert("RGB")
