"""Carry a run home in few, small files, and put it together again.

    python -m zoo.train.bundle RUN OUT --max-mib 15        RUN/model, samples and logs to at most 8 parts in OUT
    python -m zoo.train.bundle --unbundle OUT RUN          back again

The parts are one uncompressed tar, cut up; what matters most comes first (model, samples, logs). What does not fit in
the parts allowed is left out by name, never cut: a missing last part costs sample sheets, not weights.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

ORDER = ("model", "logs", "samples")
MIB = 1 << 20


def members(run: Path) -> list[Path]:
    """Files of a run in order of importance, relative to it; sheets after the last step count come last."""
    found = []
    for name in ORDER:
        found += sorted(p.relative_to(run) for p in (run / name).rglob("*") if p.is_file())
    return found


def bundle(run: Path, out: Path, max_mib: float = 15.0, parts: int = 8, total_mib: float = 62.0) -> list[Path]:
    """Write the parts; returns them. Raises ValueError if even the model does not fit."""
    room = min(int(parts * max_mib * MIB), int(total_mib * MIB)) - 64 * 1024
    buffer, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in members(run):
            size = (run / name).stat().st_size
            if buffer.tell() + size + 2048 > room:
                left_out.append(str(name))
                continue
            tar.add(run / name, arcname=str(name))
        if any(name.startswith("model/") for name in left_out):
            raise ValueError(f"the model does not fit in {room / MIB:.1f} MiB; too large: {', '.join(left_out)}")
    data, step = buffer.getvalue(), int(max_mib * MIB)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(-(-len(data) // step)):
        part = out / f"run.tar.{index}"
        part.write_bytes(data[index * step : (index + 1) * step])
        written.append(part)
    summary = {
        "parts": len(written),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "left_out": left_out,
    }
    print(json.dumps(summary))
    return written


def unbundle(parts: Path, run: Path) -> None:
    """Unpack the parts in a folder. Raises ValueError if there are none or one is missing before the last."""
    found = sorted(parts.glob("run.tar.*"), key=lambda p: int(p.suffix[1:]))
    if not found or [int(p.suffix[1:]) for p in found] != list(range(len(found))):
        raise ValueError(f"{parts} does not hold run.tar.0, run.tar.1, ... without a gap")
    data = io.BytesIO(b"".join(p.read_bytes() for p in found))
    run.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=data, mode="r") as tar:
        tar.extractall(run, filter="data")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--unbundle", action="store_true")
    parser.add_argument("--max-mib", type=float, default=15.0)
    parser.add_argument("--parts", type=int, default=8)
    args = parser.parse_args(argv)
    if args.unbundle:
        unbundle(args.source, args.target)
    else:
        bundle(args.source, args.target, args.max_mib, args.parts)


if __name__ == "__main__":
    main()
