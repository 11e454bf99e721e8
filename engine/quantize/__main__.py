"""Command line of `python -m engine.quantize`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.errors import ArgumentError, EngineError

_EXAMPLES = """examples:
  python -m engine.quantize tiny --out my-int4 --calib prompts.txt
  python -m engine.quantize my-flux --out my-flux-int4 --calib prompts.txt --report my-report
  python -m engine.quantize dev --text-encoder --out awq-int4-t5.safetensors --format nunchaku
  python -m engine.quantize dev --out svdq-int4_r32-mine.safetensors --format nunchaku --calib prompts.txt

A folder opens in the apps and in python -m engine.generate when it lies beside the model's own folder under the same
name with -int4 (or -nvfp4) added. docs/quantize.md tells the rest."""


_STAGES = {
    "smooth": "move outliers of inputs into the weights, by the best of three strengths",
    "search": "try several scales for each group of weights; without it the largest weight sets the scale",
    "four-over-six": "let a group of NVFP4 weights end at 4 or 5 instead of 6 where that is closer",
    "gptq": "let later inputs make up for what rounding loses (INT4 with --calib)",
    "shift": "shift GELU outputs so that their 4-bit codes need no sign",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a bad argument or an unusable model, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        _quantize(args)
    except (EngineError, OSError) as error:
        print(f"engine.quantize: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("engine.quantize: stopped; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.quantize",
        description="Make a 4-bit SVDQuant checkpoint of a model: smoothing, a low-rank branch, the rest rounded.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="tiny, schnell, dev, a diffusers folder or a hub id")
    add("--out", required=True, type=Path, metavar="PATH",
        help="NAME.safetensors for one file, any other name for a folder; replaced when done")  # fmt: skip
    add("--format", default="canonical", choices=("nunchaku", "nunchaku_lite", "canonical"),
        help="layout to write (default canonical); docs/format.md has them")  # fmt: skip
    add("--text-encoder", action="store_true",
        help="quantize the T5 that reads the prompts instead (weight-only, FLUX models)")  # fmt: skip
    add("--precision", default="int4", choices=("int4", "nvfp4"), help="4-bit type (default int4)")
    add("--calib", default="none", metavar="FILE",
        help="text file, a prompt a line, or none: no data, the model is not run (default none)")  # fmt: skip
    add("--samples", type=int, default=16, metavar="N", help="prompts of the file to use (default 16)")
    add("--size", type=int, metavar="PIXELS", help="side of the calibration pictures (default the model's)")
    add("--steps", type=int, help="denoising steps of the calibration pictures (default the model's)")
    add("--rank", type=int, default=32, help="rank of the 16-bit branch, a multiple of 16 (default 32)")
    add("--rounds", type=int, default=8, help="rounds of refining branch and rounding (default 8)")
    add("--damping", type=float, default=0.5,
        help="how little to trust the sampled inputs to be all there are, 0.001 to 10 (default 0.5)")  # fmt: skip
    add("--keep-16bit", nargs="+", default=[], metavar="PATTERN",
        help='linears to leave in 16 bits, for example "*.proj_mlp"')  # fmt: skip
    stages = parser.add_argument_group("stages", "each is on unless left out; --rank 0 and --rounds 1 leave out theirs")
    for name, text in _STAGES.items():
        stages.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--report", type=Path, metavar="DIR", help="where the quality report (HTML, JSON) goes (default PATH-report)")
    add("--no-report", action="store_true", help="paint no pictures to compare and write no report")
    add("--device", default="auto", help="auto, cpu or cuda[:index]")
    add("--resume", action="store_true", help="go on from the blocks that a run which was ended left beside PATH")
    return parser


def _quantize(args: argparse.Namespace) -> None:
    _check(args)
    prompts = _prompts(args.calib, args.samples)
    # torch takes seconds to import; a wrong argument should not wait for it.
    from engine.quantize import quantize_model, quantize_text_encoder
    from engine.quantize.progress import Bars

    if not (args.text_encoder or args.no_report):
        from engine.quantize.report_facts import check_report_place

        check_report_place(args.report or _beside(args.out))
    _hush()
    if args.gptq and prompts and not args.text_encoder and (args.precision != "int4" or args.rounds < 2):
        why = "for INT4 only" if args.precision != "int4" else "only with --rounds 2 or more"
        print(f"engine.quantize: GPTQ is {why}; going on without it", file=sys.stderr)
    quantize = quantize_text_encoder if args.text_encoder else partial(quantize_model, size=args.size, steps=args.steps)
    with Bars() as bars:
        rows = quantize(
            args.model,
            args.out,
            prompts=prompts,
            recipe=_recipe(args),
            keep=args.keep_16bit,
            device=args.device,
            format=args.format,
            resume=args.resume,
            progress=bars,
        )
    _tell(args.out, rows, "" if args.text_encoder else " with 4-bit activations")
    if not (args.text_encoder or args.no_report):
        _report(args, rows, measured=bool(prompts))


def _report(args: argparse.Namespace, rows: Sequence[Any], measured: bool) -> None:
    """Write the report; where it was not asked for by name, a checkpoint without one is no failure."""
    from engine.models.catalogue import resolve
    from engine.quantize.calibrate import starts_from_words
    from engine.quantize.progress import Bars
    from engine.quantize.report import write_report

    # Without data the run's figures are those of inputs that count alike: real ones, where they can be had, say more.
    records = rows if measured or not starts_from_words(resolve(args.model)) else None
    where = args.report or _beside(args.out)
    try:
        with Bars() as bars:
            write_report(
                where, model=args.model, checkpoint=args.out, records=records, device=args.device, progress=bars
            )
    except EngineError as error:
        if args.report:
            raise
        print(f"engine.quantize: the checkpoint is whole, but no quality report was made: {error}", file=sys.stderr)
        return
    print(f"quality report: {where / 'index.html'}")


def _beside(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.safetensors')}-report")


def _recipe(args: argparse.Namespace) -> Any:
    from engine.quantize import Recipe

    asked = {name: getattr(args, name) for name in ("precision", "rank", "rounds", "damping")}
    asked |= {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _STAGES if name != "smooth"}
    return Recipe(**asked) if args.smooth else Recipe(**asked, alphas=())


def _check(args: argparse.Namespace) -> None:
    if args.rank < 0 or args.rank % 16:
        raise ArgumentError(f"--rank: expected a multiple of 16 from 0 up, got {args.rank}")
    if not 0.001 <= args.damping <= 10:
        raise ArgumentError(f"--damping: expected a number from 0.001 to 10, got {args.damping:g}")
    for name in ("precision", "rank", "rounds", "damping", "size", "steps", "report"):
        if args.text_encoder and getattr(args, name) != _parser().get_default(name):
            raise ArgumentError(f"--{name}: a text encoder has no such choice, since its weights alone become 4-bit")
    for name in ("samples", "rounds"):
        if getattr(args, name) < 1:
            raise ArgumentError(f"--{name}: expected 1 or more, got {getattr(args, name)}")


def _prompts(name: str, samples: int) -> list[str]:
    if name == "none":
        return []
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"--calib: expected none or a text file, a prompt a line, got {name} ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"--calib: expected a prompt a line, but {name} holds none")
    return lines[:samples]


def _hush() -> None:
    """The one bar to be seen is ours, not one for each file that diffusers and transformers open."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _tell(out: Path, rows: Sequence[Any], how: str) -> None:
    files = out.glob("*.safetensors") if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    print(f"{out}: {size / 2**20:.1f} MiB, {len(rows)} groups of linears")
    print(f"largest relative output errors{how}:")
    for row in sorted(rows, key=lambda row: -row.error_w4a4)[:8]:
        print(f"  {row.error_w4a4:6.3f}  {row.kind:<5} {row.name}")


if __name__ == "__main__":
    sys.exit(main())
