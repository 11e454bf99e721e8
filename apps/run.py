"""All six apps in one process: a page that shows them, and a page each.

python apps/run.py --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script from a checkout that is not installed.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apps.common import App, cli

EXAMPLES = """examples:
  python apps/run.py                           each app with its small model, or a large one that is ready here
  python apps/run.py --small                   the small models, whatever is here
  python apps/run.py --host 0.0.0.0            for others on your network

Each app has an endpoint of its own: gradio_client.Client("http://127.0.0.1:7860").predict(
    prompt="a red cube", seed=7, api_name="/flux_t2i")"""


def apps() -> tuple[App, ...]:
    """The suite, in the order in which its page shows it."""
    from apps.depth_canny.run import APP as DEPTH_CANNY
    from apps.fill.run import APP as FILL
    from apps.flux_t2i.run import APP as FLUX_T2I
    from apps.redux.run import APP as REDUX
    from apps.sana_t2i.run import APP as SANA_T2I
    from apps.sketch.run import APP as SKETCH

    return FLUX_T2I, SKETCH, DEPTH_CANNY, FILL, REDUX, SANA_T2I


def parser() -> argparse.ArgumentParser:
    """The flags that make sense for six apps at once."""
    this = cli.bare_parser("python apps/run.py", "Nibble Studio, all six apps in one process and one queue.", EXAMPLES)
    models = cli.add_groups(this)
    models.add_argument("--small", action="store_true", help="the small models that ship, even where large ones are")
    return this


def open_studios(args: argparse.Namespace, loader: Any = None) -> list[Any]:
    """A studio an app, on one shelf: what an app needs is loaded when its page is opened first.

    Raises ModelError, ArgumentError or SafetyError with one sentence.
    """
    from apps.common.shelf import Shelf
    from apps.common.studio import Studio

    shelf, rooms = Shelf(loader or cli.loader_for(args)), []
    for app in apps():
        args.model = app.models[0] if args.small else "auto"
        rooms.append(cli.rooms_of(app, args, shelf))
    checkers = cli.checkers_of(args)
    return [Studio(app, found, *checkers) for app, found in zip(apps(), rooms, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the suite until interrupted. Returns the exit status: 0 after an interrupt, 2 for an unusable value."""
    args = parser().parse_args(argv)
    cli.begin()
    from engine import EngineError
    from safety import SafetyError

    try:
        studios = open_studios(args)
    except (EngineError, SafetyError) as error:
        print(f"nibble: {error}", file=sys.stderr)
        return 2
    from apps.common.house import build

    print("Nibble Studio, six apps; each loads its model when its page is opened first.")
    try:
        cli.stay_open(cli.serve(build(studios), **cli.serve_options(args)), args)
    except OSError as error:
        print(f"nibble: the pages could not be opened on {args.host}: {error}", file=sys.stderr)
        return 2
    finally:
        for studio in studios:
            studio.pictures.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
