from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from engine.placing import place, writing


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_placed_file_has_the_permissions_of_an_ordinary_one(umask: int, tmp_path: Path):
    handle, partial = tempfile.mkstemp(dir=tmp_path)
    os.close(handle)
    before = os.umask(umask)
    try:
        place(Path(partial), tmp_path / "done")
        ordinary = tmp_path / "ordinary"
        ordinary.touch()
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("done", "ordinary")]
    assert modes[0] == modes[1]
    assert not Path(partial).exists()


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    with writing(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(TypeError), writing(path) as file:
        file.write("no bytes")  # pyright: ignore[reportArgumentType]
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
