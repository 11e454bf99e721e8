"""How far a run of everything is, read from the files it keeps."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path


def line(out: Path) -> str:
    """The run's state in one line."""
    told, now = json.loads((out / "status.json").read_text()), time.time()
    parts = []
    for name, part in told["parts"].items():
        if part["state"] == "running":
            parts.append(f"{name} {(now - part['began']) / 60:.1f}/{part['minutes']:.1f} {_last(out / name)}")
        else:
            parts.append(f"{name} {part['state']}")
    return f"[{(now - told['began']) / 60:5.1f} of {(told['end'] - told['began']) / 60:.0f} min] " + " | ".join(parts)


def _last(folder: Path) -> str:
    """The gist of the last line of a part's log."""
    try:
        with (folder / "logs" / "log.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
            row = json.loads(file.read().decode().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "starting"
    names = ("stage", "step", "loss", "valid", "it_s", "recorded", "pictures", "error")
    return " ".join(f"{n} {row[n]}" if n != "stage" else str(row[n]) for n in names if n in row)


def alive(out: Path) -> bool:
    """Whether a run's supervisor is there; raises FileNotFoundError where none was started."""
    told = json.loads((out / "status.json").read_text())
    with contextlib.suppress(ChildProcessError):
        os.waitpid(told["pid"], os.WNOHANG)  # if it is this process's own child and has ended, let it go
    try:
        os.kill(told["pid"], 0)
    except ProcessLookupError:
        return False
    return not told["finished"]


def watch(out: Path, seconds: float) -> bool:
    """Print a line every 20 seconds until the run or the time is over. True once the run is over."""
    until, next_line = time.time() + seconds, time.time()
    while alive(out) and time.time() < until:
        if time.time() >= next_line:
            next_line += 20
            print(line(out), flush=True)
        time.sleep(0.3)
    print(line(out), flush=True)
    return not alive(out)
