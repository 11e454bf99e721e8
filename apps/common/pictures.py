"""Pictures on disk: PNG files that carry their settings, in bounded number, and the way back from a file."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image

from engine import Result, read_metadata

__all__ = ["NotOurs", "Pictures", "recall"]


class NotOurs(ValueError):
    """The file carries no settings of this suite; the message says so in one sentence."""


class Pictures:
    """Keeps the newest `limit` pictures under Gradio's own cache folder and deletes older ones.

    Gradio serves and ages files of that folder (`delete_cache`), so nothing is copied a second time.
    """

    def __init__(self, slug: str, limit: int = 400) -> None:
        self._slug = slug
        self._limit = limit
        self._lock = threading.Lock()
        self._kept: deque[Path] = deque()
        folder = Path(get_upload_folder())
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"nibble-{slug}-", dir=folder))

    def save(self, result: Result, own: Mapping[str, Any] | None = None) -> str:
        """Write the picture with its settings, the app's `own` too; named as a download. Returns the path."""
        return str(result.save(self._room() / f"{self._slug}-{result.seed}-{result.precision}.png", own))

    def save_map(self, image: Image.Image) -> str:
        """Write a difference map. Returns the path."""
        path = self._room() / "difference.png"
        image.save(path, format="PNG")
        return str(path)

    def close(self) -> None:
        """Delete the folder and all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _room(self) -> Path:
        room = Path(tempfile.mkdtemp(dir=self.folder))
        with self._lock:
            self._kept.append(room)
            old = [self._kept.popleft() for _ in range(len(self._kept) - self._limit)]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)
        return room


def recall(path: str | Path) -> Mapping[str, Any]:
    """Return the settings a PNG of this suite carries.

    Raises NotOurs when the file is no picture or carries none.
    """
    try:
        settings = read_metadata(path)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise NotOurs("That file could not be read as a picture.") from error
    if settings is None:
        raise NotOurs("That picture carries no Nibble Studio settings; only PNG files saved by these apps do.")
    return settings
