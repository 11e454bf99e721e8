"""Command line of `python -m engine.quantize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError

_EXAMPLES = """example:
  python -m engine.quantize tiny --out my-int4 --calib prompts.txt --rank 32

The folder it writes opens with python -m engine.generate and with the apps when it lies beside the model's own
folder under the same name with -int4 added."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a bad argument or an unusable model."""
    args = _parser().parse_args(argv)
    try:
        _quantize(args)
    except (EngineError, OSError) as error:
        print(f"engine.quantize: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.quantize",
        description="Make a 4-bit SVDQuant checkpoint of a model: smoothing, a low-rank branch, the rest rounded.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="tiny, schnell, dev, a diffusers folder or a hub id")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; replaced when done")
    parser.add_argument("--precision", default="int4", choices=("int4", "nvfp4"), help="4-bit type (default int4)")
    parser.add_argument("--calib", type=Path, metavar="FILE", help="text file, a prompt a line (default: no data)")
    parser.add_argument("--samples", type=int, default=16, help="prompts of the file to use (default 16)")
    parser.add_argument("--rank", type=int, default=32, help="rank of the 16-bit branch, a multiple of 16 (default 32)")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of refining branch and rounding (default 8)")
    parser.add_argument("--gptq", action=argparse.BooleanOptionalAction, default=True,
                        help="let later inputs make up for what rounding loses (INT4; default on)")  # fmt: skip
    parser.add_argument("--keep-16bit", nargs="*", default=[], metavar="PATTERN", help="linears to leave in 16 bits")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a quality report (HTML, JSON) there as well")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:index]")
    return parser


def _quantize(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from engine.errors import ArgumentError
    from engine.quantize import Recipe, quantize_model

    if args.rank < 0 or args.rank % 16:
        raise ArgumentError(f"--rank: expected a multiple of 16 from 0 up, got {args.rank}")
    if args.gptq and (args.precision != "int4" or args.rounds < 2):
        why = "for INT4 only" if args.precision != "int4" else "only with --rounds 2 or more"
        print(f"engine.quantize: GPTQ is {why}; going on without it", file=sys.stderr)
        args.gptq = False
    if args.samples < 1 or args.rounds < 1:
        raise ArgumentError(f"--samples and --rounds: expected 1 or more, got {args.samples} and {args.rounds}")
    prompts = _prompts(args.calib, args.samples)
    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=total, desc=stage, file=sys.stderr)
        bars[stage].update(done - bars[stage].n)

    recipe = Recipe(precision=args.precision, rank=args.rank, rounds=args.rounds, gptq=args.gptq)
    report = quantize_model(
        args.model,
        args.out,
        prompts=prompts,
        recipe=recipe,
        keep=args.keep_16bit,
        device=args.device,
        progress=progress,
    )
    for bar in bars.values():
        bar.close()
    size = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size / 2**20:.1f} MiB, {len(report)} groups of linears")
    print("largest relative output errors:")
    for row in sorted(report, key=lambda row: -row.error)[:8]:
        print(f"  {row.error:6.3f}  {row.kind:<5} {row.name}")
    if args.report:
        from engine.quantize.report import write_report

        write_report(args.report, model=args.model, checkpoint=args.out, device=args.device, progress=None)
        print(f"quality report: {args.report / 'index.html'}")


def _prompts(file: Path | None, samples: int) -> list[str]:
    from engine.errors import ArgumentError

    if file is None:
        return []
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"--calib: {file} holds no prompt")
    return lines[:samples]


if __name__ == "__main__":
    sys.exit(main())
