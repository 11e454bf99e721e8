"""The compiled modules need no torch and no CUDA runtime library: one build serves every torch."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from engine.ops import backends

DT_NEEDED, DT_STRTAB = 1, 5
ALLOWED = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"}


def needed_libraries(path: Path) -> list[str]:
    """Names in the dynamic section of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    segments = [struct.unpack_from("<IIQQQQ", data, offset + i * size) for i in range(count)]
    dynamic = next((start, length) for kind, _, start, _, _, length in segments if kind == 2)
    entries = list(struct.iter_unpack("<qQ", data[dynamic[0] : sum(dynamic)]))
    table = next(value for tag, value in entries if tag == DT_STRTAB)
    # The table is given as an address in memory; the segment that holds it says where it lies in the file.
    table += next(start - at for kind, _, start, at, _, length in segments if kind == 1 and at <= table < at + length)
    names = [table + value for tag, value in entries if tag == DT_NEEDED]
    return [data[at : data.index(b"\0", at)].decode() for at in names]


@pytest.mark.parametrize("name", ["_cpu", "_cuda"])
def test_modules_link_to_the_system_alone(name: str):
    module = backends.cpu_kernels() if name == "_cpu" else backends.cuda_kernels()
    if module is None:
        pytest.skip("the CUDA module was not built (no nvcc)")
    assert module.__file__ is not None
    needed = {library for library in needed_libraries(Path(module.__file__)) if not library.startswith("ld-linux")}
    assert "libc.so.6" in needed
    assert needed <= ALLOWED, f"{name} needs {sorted(needed - ALLOWED)}"
