"""Two faults of Gradio, mended: pictures half read, and tracebacks in the terminal for tabs that were closed."""

from __future__ import annotations

import logging
from pathlib import Path

from gradio import processing_utils
from PIL import Image
from starlette.requests import ClientDisconnect

from engine.placing import writing

__all__ = ["mend", "save_whole"]


def mend() -> None:
    """Put both in place; as often as one likes."""
    processing_utils.save_pil_to_cache = save_whole
    logging.getLogger("uvicorn.error").addFilter(_is_worth_telling)


def save_whole(img: Image.Image, cache_dir: str, name: str = "image", format: str = "webp") -> str:
    """Write a picture into the cache, below the hash of its bytes, in one go; returns its path.

    Gradio's own writes over the file that is there. Every event brings its pictures here anew, so that another one, of
    another visitor with the same example perhaps, could read half a picture.
    """
    data = processing_utils.encode_pil_to_bytes(img, format)
    folder = Path(cache_dir) / processing_utils.hash_bytes(data)
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / f"{name}.{format}").resolve()
    with writing(path) as file:
        file.write(data)
    return str(path)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Not where a browser left while it was still sending."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, ClientDisconnect)
