"""The one command line of all apps: flags (flags.py) in, a served page out."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.common.app import App
from apps.common.flags import add_groups, bare_parser, parser
from apps.common.models import Choice, beside, choose, has_column, parted
from engine import EngineError
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from apps.common.shelf import Shelf
    from apps.common.studio import Room, Studio
    from safety import Checker, ImageChecker

__all__ = [
    "add_groups",
    "bare_parser",
    "begin",
    "checkers_of",
    "launch",
    "loader_for",
    "main",
    "open_studio",
    "parser",
    "precisions_of",
    "rooms_of",
    "serve",
    "serve_options",
    "stay_open",
]

ASSETS = Path(__file__).with_name("assets")


def main(app: App, argv: Sequence[str] | None = None) -> int:
    """Serve `app` until interrupted. Returns the exit status: 0 after an interrupt, 2 for an unusable value."""
    args = parser(app).parse_args(argv)
    begin()
    from safety import SafetyError

    try:
        studio = open_studio(app, args)
    except (EngineError, SafetyError) as error:
        print(f"{app.slug}: {error}", file=sys.stderr)
        return 2
    try:
        return _serve(studio, args)
    except OSError as error:
        print(f"{app.slug}: the page could not be opened on {args.host}: {error}", file=sys.stderr)
        return 2
    finally:
        studio.pictures.close()


def begin() -> None:
    """What comes before gradio and huggingface_hub are imported: they read then that nothing is reported to anybody."""
    logging.basicConfig(format="%(name)s: %(message)s")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def open_studio(app: App, args: argparse.Namespace, loader: Callable[..., Any] | None = None) -> Studio:
    """Choose the model, load the safety checkers and begin to load the engines.

    Raises ModelError, ArgumentError or SafetyError with one sentence; a checker that fails to load ends the start.
    """
    from apps.common.shelf import Shelf
    from apps.common.studio import Studio
    from apps.deploy import zero

    rooms = rooms_of(app, args, Shelf(loader or loader_for(args)))
    checkers = checkers_of(args)
    if zero.here():
        zero.borrow([room.pool for room in rooms])
    else:
        rooms[0].pool.start()
    return Studio(app, rooms, *checkers)


def checkers_of(args: argparse.Namespace) -> tuple[Checker, ImageChecker | None]:
    """What judges prompts, and what judges pictures where that is asked for.

    Raises SafetyError for one that cannot be loaded.
    """
    from apps.deploy import zero
    from safety import load_checker, load_image_checker

    # On ZeroGPU both judge while no GPU is lent.
    device, pictures = "cpu" if zero.here() else args.device, args.safety_images
    return load_checker(args.safety, device=device, path=args.safety_path), (
        None if pictures == "off" else load_image_checker(pictures, device=device, path=args.safety_images_path)
    )


def rooms_of(app: App, args: argparse.Namespace, shelf: Shelf) -> list[Room]:
    """The models that the page of `app` can run, the one it opens with first; nothing is loaded yet.

    Raises ModelError or ArgumentError with one sentence.
    """
    from apps.common.studio import Room

    found = choose(args.model, app.models, _has_cuda)
    precisions = precisions_of(found.spec, args.precisions)
    _check_device(args.device)
    others = [other for other in beside(found, app.models) if all(has_column(other.spec, name) for name in precisions)]
    choices = [_with_encoder(each, getattr(args, "qencoder", None)) for each in (found, *others)]
    return [Room(each, shelf.pool(each.spec, precisions)) for each in choices]


def _with_encoder(choice: Choice, encoder: str | None) -> Choice:
    return replace(choice, spec=replace(choice.spec, text_encoder=encoder)) if encoder else choice


def precisions_of(spec: ModelSpec, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The precisions asked for, or the usual ones. Raises ArgumentError for one that `spec` lacks, or one twice."""
    from engine import ArgumentError

    precisions = tuple(asked or spec.usual)
    unknown = [name for name in precisions if not has_column(spec, name)]
    if unknown:
        raise ArgumentError(f"precisions: {spec.title} has {', '.join(spec.precisions)}, got {', '.join(unknown)}")
    if len(set(precisions)) < len(precisions):
        raise ArgumentError(f"precisions: expected each once, got {' '.join(precisions)}")
    return precisions


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu"):
        from engine.devices import pick_device

        pick_device(device)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def loader_for(args: argparse.Namespace) -> Callable[..., Any]:
    """What a pool calls to open an engine on the device of the command line."""

    def load(spec: ModelSpec, precision: str, share: Any, progress: Callable[[str], None]) -> Any:
        # Imported in the loading thread: the page is up while torch and diffusers still come in.
        from engine.generate import Engine

        _hush()
        kind, activation = parted(precision)
        eight = kind != "bf16" and spec.family == "flux"  # what may be asked for 8 bits
        return Engine.load(
            spec, kind, device=args.device, activation=activation or args.activation, share=share, progress=progress,
            attention=args.attention if eight else "auto", wide_weights=args.wide_weights and kind != "bf16",
            vram_budget=args.vram_budget, offload=args.offload,
        )  # fmt: skip

    return load


def _hush() -> None:
    """Keep the libraries' bars and notes out of the terminal; the page shows how loading goes."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def launch(studio: Studio, **options: Any) -> Any:
    """Build the page and serve it; `options` go to Gradio's launch. Returns the Blocks."""
    from apps.common.shell import build

    return serve(build(studio), **options)


def serve(demo: Any, **options: Any) -> Any:
    """Serve a built page with the look of the suite; `options` go to Gradio's launch. Returns the Blocks."""
    from apps.common.theme import NibbleTheme

    demo.queue(max_size=options.pop("max_queue", 20), default_concurrency_limit=16)
    demo.launch(
        theme=NibbleTheme(),
        css_paths=ASSETS / "page.css",
        head=f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>",
        js=(ASSETS / "light.js").read_text(encoding="utf-8"),
        favicon_path=ASSETS / "favicon.svg",
        footer_links=["api"],
        run_history=False,
        mcp_server=_has_mcp(),
        show_error=True,
        max_file_size="20mb",
        **options,
    )
    return demo


def _has_mcp() -> bool:
    from importlib.util import find_spec

    return find_spec("mcp") is not None


def _serve(studio: Studio, args: argparse.Namespace) -> int:
    print(f"Nibble Studio, {studio.app.title}: {studio.choice.spec.title}. {studio.choice.reason}")
    demo = launch(studio, **serve_options(args))
    stay_open(demo, args)
    return 0


def serve_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says about serving, in Gradio's words."""
    return {
        "max_queue": args.max_queue,
        "server_name": args.host,
        "server_port": args.port,
        "share": args.share,
        "root_path": args.root_path or None,
        "inbrowser": args.open_browser,
        "prevent_thread_lock": True,
        "quiet": True,
    }


def stay_open(demo: Any, args: argparse.Namespace) -> None:
    """Say where the page is and serve it until interrupted."""
    print(f"Page: {demo.local_url}", flush=True)
    if args.share:
        print(f"Public link: {demo.share_url}", flush=True)
    demo.block_thread()
