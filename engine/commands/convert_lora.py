"""Command line of `python -m engine.lora.convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError

__all__ = ["main"]

_HELP = """\
Convert a LoRA to nunchaku's runtime form, for tools that need it. engine.lora.load_lora takes LoRAs of any format
as they are, so nothing has to be converted to be used here.

example
  python -m engine.lora.convert --quant-path svdq-int4_r32-flux.1-dev.safetensors --lora-path ghibsky.safetensors \\
      --output-root loras --lora-name svdq-int4-ghibsky
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.lora.convert", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quant-path", required=True, help="4-bit checkpoint, file or folder of any layout")
    parser.add_argument("--lora-path", required=True, help="LoRA file")
    parser.add_argument(
        "--lora-format",
        default="auto",
        choices=("auto", "diffusers", "comfyui", "xlabs"),
        help="format of the LoRA (default: auto, found from its keys)",
    )
    parser.add_argument("--output-root", default=".", help="folder to write to (default: here)")
    parser.add_argument("--lora-name", default=None, help="name of the new file (default: svdq-<lora>)")
    parser.add_argument("--no-strict", action="store_true", help="go on when modules or keys of the LoRA match nothing")
    options = parser.parse_args(argv)
    from engine.checkpoint.hub import resolve
    from engine.lora.convert import convert_lora, read_as

    name = options.lora_name or f"svdq-{Path(options.lora_path).stem}"
    target = Path(options.output_root) / f"{name.removesuffix('.safetensors')}.safetensors"
    try:
        lora = read_as(resolve(options.lora_path), options.lora_format)
        unmatched = convert_lora(resolve(options.quant_path), lora, target, strict=not options.no_strict)
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for key in lora.left_out:
        print(f"left out, not for the transformer: {key}", file=sys.stderr)
    for module in unmatched:
        print(f"left out, matches nothing: {module}", file=sys.stderr)
    print(target)
    return 0
