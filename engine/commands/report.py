"""Command line of `python -m engine.quantize.report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ArgumentError, EngineError

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m engine.quantize.report zoo/weights/flux-tiny-int4 --model tiny --out report
  python -m engine.quantize.report my-int4 --model my-model --prompts prompts.txt --activations w4a8 w4a4 --out report

Open report/index.html in a browser; report/report.json holds the same figures. LPIPS is measured where torchmetrics and
torchvision are installed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 a bad argument or an unusable model."""
    args = _parser().parse_args(argv)
    try:
        _report(args)
    except (EngineError, OSError) as error:
        print(f"engine.quantize.report: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.quantize.report",
        description="Say how good a 4-bit checkpoint is: error of each layer, pictures beside BF16, size.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="4-bit checkpoint, a folder or a .safetensors file")
    parser.add_argument("--model", required=True, help="its 16-bit model: tiny, schnell, dev, a folder or a hub id")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; replaced when done")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="text file, a prompt a line (default: four)")
    parser.add_argument("--count", type=int, help="use the first so many prompts")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--activations", nargs="+", default=["auto"], choices=("auto", "w4a8", "w4a4"),
                        help="paint a column for each; the first decides what is suggested (default auto)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:index]")
    parser.add_argument("--no-lpips", action="store_true", help="leave LPIPS out, so that nothing is fetched")
    return parser


def _report(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from engine.quantize.report import PROMPTS, write_report

    prompts = _prompts(args.prompts) if args.prompts else list(PROMPTS)
    if args.count is not None and args.count < 1:
        raise ArgumentError(f"--count: expected 1 or more, got {args.count}")
    with tqdm(file=sys.stderr) as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.set_description(stage)
            bar.total, bar.n = total, done
            bar.refresh()

        report = write_report(
            args.out,
            model=args.model,
            checkpoint=args.checkpoint,
            prompts=prompts[: args.count],
            steps=args.steps,
            activations=args.activations,
            device=args.device,
            lpips=not args.no_lpips,
            progress=progress,
        )
    for column in report.columns[1:]:
        print(f"{column.label}: PSNR {_db(column.mean('psnr'))}, SSIM {column.mean('ssim'):.3f} against BF16")
    print(f"{args.out / 'index.html'}")


def _db(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f} dB"


def _prompts(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ArgumentError(f"--prompts: {file} holds no prompt")
    return lines
