"""Carry a run home in few, small files, and put it together again.

    python -m zoo.train.bundle RUN OUT --max-mib 15        RUN/model, samples and logs to at most 8 parts in OUT
    python -m zoo.train.bundle ALL OUT --only base         of a run of zoo.train.everything: some of its parts
    python -m zoo.train.bundle --unbundle OUT RUN          back again

The parts are one uncompressed tar, cut up; what matters most comes first (weights, logs, samples). What does not fit in
the parts allowed is left out by name, never cut: a missing last part costs sample sheets, not weights. An autoencoder
that a run took over from the shipped weights is not carried again; links to a base are made anew with
`python -m zoo.train.redux --link`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file

MIB = 1 << 20
LATER = ("logs", "samples")
# What a part of a run of everything leaves behind that is worth carrying; the base is the run of a single model.
WEIGHTS = {
    "base": ("model",), "control": ("canny", "depth"), "fill": ("fill",), "sketch": ("model", "outline"),
    "redux": ("model",), "depth": ("depth-tiny",), "sana": ("model",),
}  # fmt: skip
SHIPPED = Path(__file__).parents[1] / "weights" / "flux-tiny" / "vae"


def members(run: Path, only: tuple[str, ...] = ()) -> list[Path]:
    """Files of a run in order of importance, relative to it; links are left out."""
    if (run / "status.json").exists():
        parts = [name for name in WEIGHTS if (not only or name in only) and (run / name).is_dir()]
        folders = [f"{name}/{folder}" for name in parts for folder in WEIGHTS[name]]
        folders += [f"{name}/{folder}" for folder in LATER for name in parts]
        alone = [Path("status.json"), *(Path(f"{name}.log") for name in parts if (run / f"{name}.log").exists())]
    else:
        folders, alone = ["model", *LATER], []
    found = []
    for folder in folders:
        top = run / folder
        without = "vae" if _shipped(top / "vae") else ""
        found += sorted(p.relative_to(run) for p in top.rglob("*") if _own(p, top, without))
    return found + alone


def _own(path: Path, top: Path, without: str = "") -> bool:
    """A file that is no link and lies in no linked folder, nor in the folder named."""
    between = [path, *path.parents][: len(path.relative_to(top).parts)]
    return path.is_file() and not any(p.is_symlink() for p in between) and path.relative_to(top).parts[0] != without


def _shipped(vae: Path) -> bool:
    """Whether an autoencoder is the one in zoo/weights, weight for weight."""
    names = sorted(p.name for p in vae.glob("*.safetensors"))
    if not names or names != sorted(p.name for p in SHIPPED.glob("*.safetensors")):
        return False
    for name in names:
        own, known = load_file(vae / name), load_file(SHIPPED / name)
        if own.keys() != known.keys() or not all(torch.equal(own[key], known[key]) for key in own):
            return False
    return True


def bundle(run: Path, out: Path, max_mib: float = 15.0, parts: int = 8, total_mib: float = 62.0,
           only: tuple[str, ...] = ()) -> list[Path]:  # fmt: skip
    """Write the parts; returns them. Raises ValueError if even the weights do not fit."""
    room = min(int(parts * max_mib * MIB), int(total_mib * MIB)) - 64 * 1024
    buffer, left_out = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in members(run, only):
            size = (run / name).stat().st_size
            if buffer.tell() + size + 2048 > room:
                left_out.append(str(name))
                continue
            tar.add(run / name, arcname=str(name))
        heavy = [name for name in left_out if "/" in name and not {*Path(name).parts} & {*LATER}]
        if heavy:
            raise ValueError(f"the model does not fit in {room / MIB:.1f} MiB; too large: {', '.join(heavy)}")
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
    parser.add_argument("--only", nargs="+", choices=sorted(WEIGHTS), default=[], help="parts of a run of everything")
    parser.add_argument("--max-mib", type=float, default=15.0)
    parser.add_argument("--parts", type=int, default=8)
    args = parser.parse_args(argv)
    if args.unbundle:
        unbundle(args.source, args.target)
    else:
        bundle(args.source, args.target, args.max_mib, args.parts, only=tuple(args.only))


if __name__ == "__main__":
    main()
