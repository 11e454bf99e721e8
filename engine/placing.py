"""Files that are never seen half written: a temporary file beside the place, then a rename."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

__all__ = ["place", "writing"]

_asking = threading.Lock()  # the umask is the process's and cannot be read without being set


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which is at `path` when the block ends; an exception leaves what was there before."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        place(Path(partial), path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`, with the permissions that a plain `open` would have given it.

    Temporary files are private to their owner; a web server of another user could not serve them.
    """
    with _asking:
        umask = os.umask(0)
        os.umask(umask)
    partial.chmod(0o666 & ~umask)
    os.replace(partial, path)
