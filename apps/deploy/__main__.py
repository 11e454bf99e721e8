"""Command line of `python -m apps.deploy`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from apps.deploy import plan as planning
from engine import EngineError

_EXAMPLES = """examples:
  python -m apps.deploy flux_t2i --space me/nibble --dry-run space
      writes the Space into the folder `space` and uploads nothing: look at it, try it, then upload
  python -m apps.deploy flux_t2i --space me/nibble
      the same, then makes the Space on the hub (hf auth login first) and uploads it; ZeroGPU
  python -m apps.deploy fill --space me/fill --hardware cpu-basic
      the small model on a Space with no GPU
  python -m apps.deploy flux_t2i --space me/big --model schnell --precisions int4
      a large model in one precision; the Space fetches its weights and may need a secret HF_TOKEN

The wheel is built for the Python that runs this command: 3.12 for ZeroGPU. docs/hosting.md has more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 2 for a bad argument or a Space that could not be made."""
    args = _parser().parse_args(argv)
    try:
        _deploy(args)
    except (EngineError, OSError) as error:
        print(f"apps.deploy: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(planning.apps())
    parser = argparse.ArgumentParser(
        prog="python -m apps.deploy",
        description="Put an app on a Hugging Face Space: settings, pins, a wheel of this checkout, the small weights.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("app", metavar="APP", help=names)
    parser.add_argument("--space", required=True, metavar="OWNER/NAME", help="the Space's name on the hub")
    parser.add_argument("--dry-run", type=Path, metavar="DIR", help="write the Space into DIR; upload nothing")
    parser.add_argument(
        "--model", metavar="M", help="a name of the catalogue or a hub id (default: the app's small one)"
    )
    parser.add_argument("--precisions", nargs="+", metavar="P", help="a column each (default: all the model has)")
    parser.add_argument(
        "--hardware", default=planning.ZERO, metavar="H",
        help="zero-gpu, cpu-basic or a GPU of the hub's list (default %(default)s)",
    )  # fmt: skip
    parser.add_argument("--python", metavar="X.Y", help="the Space's Python (default: 3.12 on zero-gpu, else this one)")
    parser.add_argument("--private", action="store_true", help="a new Space is for you alone")
    return parser


def _deploy(args: argparse.Namespace) -> None:
    from apps.deploy.folder import write
    from apps.deploy.upload import upload

    if args.dry_run is not None:
        planning.check_folder(args.dry_run)
    plan = planning.plan(
        args.app, args.space, model=args.model, precisions=args.precisions, hardware=args.hardware,
        python=args.python, private=args.private,
    )  # fmt: skip
    print(
        f"{plan.app.title} with {plan.spec.title}, {' and '.join(plan.precisions)}: building the wheel ...", flush=True
    )
    if args.dry_run is not None:
        _show(write(plan, args.dry_run), plan)
        return
    with tempfile.TemporaryDirectory(prefix="nibble-space-") as scratch:
        print(f"Space: {upload(plan, write(plan, Path(scratch) / 'space'))}")


def _show(folder: Path, plan: planning.Plan) -> None:
    """What was written, and how to try it in a new environment."""
    from apps.deploy.folder import pins

    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    there = [f'"{name}=={pins()[name.partition("[")[0]]}"' for name in ("gradio[mcp]", "spaces", "huggingface_hub")]
    print(f"Written: {folder}, {len(files)} files, {size:.1f} MiB. Nothing was uploaded. To try it:")
    print(
        f"  python{plan.python} -m venv try && try/bin/pip install -r {folder / 'requirements.txt'} {' '.join(there)}"
    )
    print(f"  try/bin/python {folder / 'app.py'}")


if __name__ == "__main__":
    raise SystemExit(main())
