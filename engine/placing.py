"""Put a finished temporary file where it belongs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["place"]


def place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`, with the permissions that a plain `open` would have given it.

    Temporary files are private to their owner; a web server of another user could not serve them.
    """
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o666 & ~umask)
    os.replace(partial, path)
