"""Command line of `python -m engine.convert`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from engine.errors import EngineError

__all__ = ["main"]

_HELP = """\
Convert a 4-bit checkpoint from one layout to another. Layers stream through memory one at a time, and DST appears
only when it is whole.

layouts
  canonical      plain tensors under diffusers module names (docs/format.md). DST ending in .safetensors is one file,
                 any other name a folder of shards.
  nunchaku       what nunchaku publishes: svdq-int4_r32-*.safetensors and svdq-fp4_r32-*.safetensors with their
                 metadata. Without .safetensors, DST is the older folder of two files. A T5 encoder becomes
                 awq-int4-*.safetensors.
  nunchaku_lite  a diffusers model folder whose config.json lists the 4-bit modules.

SRC may be any of these; which one is found from its contents.

examples
  python -m engine.convert svdq-int4_r32-flux.1-dev.safetensors flux-dev --to canonical
  python -m engine.convert flux-dev svdq-int4_r32-flux.1-dev.safetensors --to nunchaku
  python -m engine.convert svdq-int4_r32-flux.1-dev.safetensors flux-dev-lite --to nunchaku_lite
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.convert", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="SRC", help="checkpoint: file, folder or owner/repo/file.safetensors on the hub"
    )
    parser.add_argument("target", metavar="DST", help="file or folder to write")
    parser.add_argument("--to", required=True, choices=("canonical", "nunchaku", "nunchaku_lite"), help="layout of DST")
    parser.add_argument("--device", default="cpu", help="where layers are re-tiled, for example cuda (default: cpu)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_args(argv)
    # torch takes seconds to import; --help should not wait for it.
    from engine.checkpoint.hub import resolve
    from engine.checkpoint.translate import convert

    started = time.monotonic()
    show = _progress if not options.quiet and sys.stderr.isatty() else None
    try:
        convert(resolve(options.source), options.target, options.to, device=options.device, progress=show)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.quiet:
        print(f"{options.target}: written as {options.to} in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return 0


def _progress(done: int, total: int) -> None:
    filled = 30 * done // total
    end = "\n" if done == total else ""
    print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
