"""Command line of `python -m engine.generate`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.request import Request, Result

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m engine.generate "a large red metal sphere left of a small blue cube" --seed 7 --out pictures
  python -m engine.generate "two cones on a grey floor" --precision int4 --steps 20 --json
  python -m engine.generate "an owl reading" --model schnell --precision bf16 int4 --device cuda

Pictures are PNG files that carry their settings; the same command writes the same bytes again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a bad argument or an unusable model."""
    args = _parser().parse_args(argv)
    try:
        results = _generate(args)
    except EngineError as error:
        print(f"engine.generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("engine.generate: stopped", file=sys.stderr)
        return 130
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        _print_table(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.generate",
        description="Make one picture in each precision from the same noise, and say what each cost.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="what to paint")
    parser.add_argument(
        "--model", default="tiny", help="tiny (ships with the project), schnell, dev, a folder or a hub id"
    )
    parser.add_argument(
        "--precision", nargs="+", default=["bf16", "int4"], metavar="P", help="bf16, int4 (default: both), nvfp4"
    )
    parser.add_argument(
        "--activation", default="auto", help="what 4-bit layers see: auto, w4a8 (8-bit) or w4a4 (4-bit)"
    )
    parser.add_argument(
        "--attention",
        default="auto",
        help="what a 4-bit FLUX holds attention's values in: 16bit, 8bit, or auto (8bit for large pictures on Hopper)",
    )
    parser.add_argument(
        "--wide-weights", action="store_true", help="on Hopper, keep 8-bit copies of the 4-bit weights: faster, larger"
    )
    parser.add_argument("--vram-budget", type=float, metavar="GIB", help="GiB of a GPU that networks share in turns")
    parser.add_argument("--offload", action="store_true", help="hold one network at a time on the GPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:index]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (default: the model's)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (default: the model's)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder for the pictures (default: here)"
    )
    parser.add_argument("--json", action="store_true", help="print settings and measurements as JSON")
    return parser


def _generate(args: argparse.Namespace) -> list[dict[str, Any]]:
    request = Request(args.prompt, args.seed, args.steps, args.guidance, args.width, args.height)
    from engine.models.catalogue import resolve

    # A wrong field should be told before minutes of loading, not after.
    spec = resolve(args.model)
    request.resolved(spec)
    from engine.generate import Engine
    from engine.metrics import psnr

    args.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    first: Engine | None = None
    reference: Result | None = None
    for precision in dict.fromkeys(args.precision):
        engine = Engine.load(
            spec, precision, device=args.device, activation=args.activation, share=first, progress=_say(args.json),
            attention="auto" if precision == "bf16" else args.attention,
            wide_weights=args.wide_weights and precision != "bf16",
            vram_budget=args.vram_budget, offload=args.offload,
        )  # fmt: skip
        first = first or engine
        result = _run(engine, request, quiet=args.json)
        path = result.save(args.out / f"{_slug(args.prompt)}-{args.seed}-{precision}.png")
        row = {"file": str(path), **result.settings(), **result.measurements()}
        if reference is not None:
            value = psnr(reference.image, result.image)
            row["psnr_against"] = reference.precision
            row["psnr_db"] = None if math.isinf(value) else value
        reference = reference or result
        rows.append(row)
    return rows


def _say(quiet: bool):
    return None if quiet else lambda text: print(f"{text} ...", file=sys.stderr)


def _run(engine: Any, request: Request, quiet: bool) -> Result:
    from tqdm import tqdm

    total = request.steps or int(engine.spec.steps.default)
    with tqdm(total=total, desc=engine.precision, unit="step", disable=quiet, file=sys.stderr) as bar:
        return engine.run(request, on_step=lambda _: bar.update())


def _slug(prompt: str) -> str:
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return words[:60].rstrip("-") or "picture"


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'precision':<10} {'backend':<10} {'s':>7} {'ms/step':>8} {'weights MiB':>12} {'peak MiB':>9}"
        f" {'PSNR dB':>8}  file"
    )
    for row in rows:
        value = row.get("psnr_db")
        quality = "-" if "psnr_against" not in row else ("equal" if value is None else f"{value:.1f}")
        print(
            f"{row['precision']:<10} {row['backend']:<10} {row['seconds']:>7.2f} {row['ms_per_step']:>8.1f}"
            f" {row['weight_bytes'] / 2**20:>12.1f} {row['peak_bytes'] / 2**20:>9.1f} {quality:>8}  {row['file']}"
        )
