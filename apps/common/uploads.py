"""Pictures that visitors give: opened once, turned upright, and brought to plain RGB, or refused with a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from engine import RequestError

__all__ = ["MAX_PIXELS", "is_upload", "open_painted", "open_picture", "open_upload", "strokes"]

MAX_PIXELS = 64_000_000


def open_picture(value: Any, name: str) -> Image.Image:
    """The picture in RGB, EXIF rotation applied, see-through parts on white; `value` as for `open_upload`.

    Raises RequestError as `open_upload` does.
    """
    return _plain(open_upload(value, name))


def open_painted(value: Any, name: str) -> Image.Image | None:
    """The picture in RGB with what was painted over it; strokes without a picture lie on white paper.

    `value` as for `open_upload`; None where there is neither a picture nor a stroke.
    Raises RequestError as `open_upload` does.
    """
    layers, given = strokes(value, name), value
    if isinstance(value, Mapping) and "background" in value:
        given = value["background"]
    if not given and not layers:
        return None
    page = open_picture(given, name) if given else Image.new("RGB", layers[0].size, "white")
    for layer in layers:
        over = layer.resize(page.size)
        page.paste(over, mask=over)
    return page


def strokes(value: Any, name: str) -> list[Image.Image]:
    """The layers of a canvas that have something on them, in RGBA.

    Raises RequestError as `open_upload` does.
    """
    layers = value.get("layers") if isinstance(value, Mapping) else None
    if not isinstance(layers or [], list | tuple):
        raise RequestError(name, f"{name}: expected a list of layers, got {layers!r:.80}")
    opened = [open_upload(layer, name).convert("RGBA") for layer in layers or ()]
    return [layer for layer in opened if layer.getchannel("A").getbbox()]


def open_upload(value: Any, name: str) -> Image.Image:
    """The picture in its own mode, EXIF rotation applied.

    `value` is what the page or the interface hands over: a path in the upload folder, a mapping with a "path", or the
    value of a canvas, of which the background counts.
    Raises RequestError naming `name` when there is none, or when the file is no picture, damaged or too large.
    """
    if isinstance(value, Mapping) and "background" in value:
        value = value["background"]
    if not value:
        raise RequestError(name, f"{name}: expected a picture to start from, got none; upload one or try an example")
    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str | Path) or not is_upload(Path(path)):
        raise RequestError(name, f"{name}: expected an uploaded picture file, got {value!r:.80}")
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                limit = MAX_PIXELS // 1_000_000
                raise RequestError(
                    name, f"{name}: expected at most {limit} million pixels, got {file.width} x {file.height}"
                )
            return ImageOps.exif_transpose(file)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(name, f"{name}: the picture is too large to open") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(name, f"{name}: the file could not be read as a picture; it may be damaged") from error


def is_upload(path: Path) -> bool:
    """Whether the file came through an upload: no other file of this machine may be opened from outside."""
    from gradio.utils import get_upload_folder

    return path.resolve().is_relative_to(Path(get_upload_folder()).resolve())


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        page = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(page, picture.convert("RGBA"))
    return picture.convert("RGB")
