"""Real pictures of a data set, in a folder, a zip or a tar, found by their names."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from engine.errors import ArgumentError

__all__ = ["Archive"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Archive:
    """A folder, a .zip or a .tar(.gz) of pictures."""

    path: Path

    @classmethod
    def near(cls, folder: Path, names: Sequence[str]) -> Archive | None:
        """The first of `names` in `folder`, packed or already unpacked; None where the set has prompts alone."""
        stems = [name.split(".")[0] for name in names]
        found = [folder / name for name in (*names, *stems) if (folder / name).exists()]
        return cls(found[0]) if found else None

    def copy(self, names: Iterable[str], out: Path) -> None:
        """Put the pictures of these names into `out`, as NAME.SUFFIX; those already there are kept.

        Raises ArgumentError naming the first one that the archive lacks, or when the archive cannot be read.
        """
        out.mkdir(parents=True, exist_ok=True)
        wanted = set(names) - {path.stem for path in out.iterdir() if path.suffix in _SUFFIXES}
        if not wanted:
            return
        try:
            for name, suffix, source in self._members(wanted):
                partial = out / f"{name}{suffix}.partial"
                with open(partial, "wb") as file:
                    shutil.copyfileobj(source, file)
                partial.rename(out / f"{name}{suffix}")
                wanted.discard(name)
        except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
            raise ArgumentError(f"prompts: {self.path} cannot be read: {error}") from error
        if wanted:
            raise ArgumentError(f"prompts: {self.path} holds no picture named {min(wanted)!r} ({len(wanted)} missing)")

    def _members(self, wanted: set[str]) -> Iterator[tuple[str, str, IO[bytes]]]:
        """(name, suffix, open file) of each wanted picture, in the archive's own order."""
        if self.path.is_dir():
            for path in sorted(self.path.rglob("*")):
                if _is_wanted(path.name, wanted):
                    with open(path, "rb") as file:
                        yield path.stem, path.suffix.lower(), file
        elif zipfile.is_zipfile(self.path):
            with zipfile.ZipFile(self.path) as files:
                for member in files.namelist():
                    if _is_wanted(member, wanted):
                        with files.open(member) as file:
                            yield *_split(member), file
        else:
            with tarfile.open(self.path) as files:
                for member in files:
                    if member.isfile() and _is_wanted(member.name, wanted):
                        with _extracted(files, member) as file:
                            yield *_split(member.name), file


@contextmanager
def _extracted(files: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[IO[bytes]]:
    file = files.extractfile(member)
    assert file is not None  # only links and folders have none
    with file:
        yield file


def _is_wanted(member: str, wanted: set[str]) -> bool:
    name, suffix = _split(member)
    return suffix in _SUFFIXES and name in wanted


def _split(member: str) -> tuple[str, str]:
    path = PurePosixPath(member)
    return path.stem, path.suffix.lower()
