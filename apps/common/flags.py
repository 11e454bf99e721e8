"""The flags of the apps' command lines: each is described where it is defined."""

from __future__ import annotations

import argparse
from typing import Any

from apps.common.app import App
from apps.common.models import ACTIVATIONS
from engine.models import catalogue
from engine.request import ATTENTIONS

__all__ = ["add_groups", "bare_parser", "parser"]

CHECKERS = ("words", "qwen3guard", "shieldgemma", "off")
IMAGE_CHECKERS = ("off", "nsfw")
T5_4BIT = "nunchaku-tech/nunchaku-t5/awq-int4-flux.1-t5xxl.safetensors"

_EXAMPLES = """examples:
  {run}
      the small model, on this machine, no download; opens at http://127.0.0.1:7860
  {run} --model {large} --device cuda
      a large model; its weights are fetched once
  {run} --precisions int4
      one column, half the memory
  {run} --precisions int4 bf16
      4-bit first
  {run} --host 0.0.0.0 --port 8080
      for others on your network
  {run} --safety qwen3guard --safety-path DIR
      a checker with weights you have in DIR

The page is an API too; "Use by API or MCP" at its foot lists the parameters of /generate, as does this:
  python -c 'import gradio_client; gradio_client.Client("http://127.0.0.1:7860").view_api()'"""


def parser(app: App) -> argparse.ArgumentParser:
    """The parser that every app uses."""
    run = f"python apps/{app.slug}/run.py"
    large = next((name for name in app.models if not catalogue.resolve(name).local), app.models[-1])
    examples = _EXAMPLES.replace("{run}", run).replace("{large}", large)
    this = bare_parser(run, f"Nibble Studio, {app.title}. {app.summary}", examples)
    models = add_groups(this)
    models.add_argument(
        "--model", default="auto", metavar="M",
        help=f"auto (a large model where a CUDA device and its weights are here, else {app.models[0]}), "
        f"{', '.join(app.models)}, a diffusers folder or a hub id (default auto)",
    )  # fmt: skip
    models.add_argument(
        "--qencoder", "--use-qencoder", dest="qencoder", nargs="?", const=T5_4BIT, metavar="FILE",
        help="a 4-bit T5 text encoder for cards with little memory: a file or a hub name (default: the published one)",
    )  # fmt: skip
    return this


def bare_parser(run: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with no flags yet."""
    return argparse.ArgumentParser(
        prog=run, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_groups(this: argparse.ArgumentParser) -> Any:
    """Add the flags that all pages share; returns the group of those that say what paints."""
    models = this.add_argument_group("what paints")
    models.add_argument(
        "--precisions",
        nargs="+",
        metavar="P",
        help="a column each, painted in this order: bf16, int4 (the default), nvfp4; int4-w4a8 and int4-w4a4 for "
        "columns with 8-bit and 4-bit numbers",
    )
    models.add_argument(
        "--activation", default="auto", choices=("auto", *ACTIVATIONS),
        help="numbers that go into the 4-bit layers: 8 bits (w4a8) or 4 (w4a4); auto, the default, is 8, "
        "which is nearer to 16 bits and runs everywhere",
    )  # fmt: skip
    models.add_argument(
        "--attention", default="auto", choices=ATTENTIONS,
        help="what 4-bit FLUX models hold attention's probabilities and values in: 16 bits or 8; auto, the default, is "
        "8 on Hopper for pictures from about 1400x1400 on, where a step takes a tenth less for 0.2 dB",
    )  # fmt: skip
    models.add_argument(
        "--wide-weights", action="store_true",
        help="on Hopper, keep 8-bit copies of the 4-bit weights: faster, for 8.3 GiB more with FLUX.1",
    )  # fmt: skip
    models.add_argument(
        "--vram-budget", type=float, metavar="GIB",
        help="GiB of a GPU that all models together keep to: networks come when they are called, a transformer that is "
        "too large block by block",
    )  # fmt: skip
    models.add_argument("--offload", action="store_true", help="hold one network at a time on the GPU")
    models.add_argument("--device", default="auto", metavar="D", help="auto, cpu or cuda[:index] (default auto)")
    _add_serving(this)
    _add_safety(this)
    return models


def _add_serving(this: argparse.ArgumentParser) -> None:
    serving = this.add_argument_group("where the page is")
    serving.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default %(default)s)"
    )
    serving.add_argument("--port", type=_port, metavar="N", help="default: the first free one from 7860")
    serving.add_argument("--share", action="store_true", help="also open a public link; off unless you ask")
    serving.add_argument("--root-path", default="", metavar="PATH", help="sub-path behind a reverse proxy")
    serving.add_argument("--max-queue", type=_positive, default=20, metavar="N", help="runs that may wait (default 20)")
    serving.add_argument("--open-browser", action="store_true", help="open the page when it is up")


def _add_safety(this: argparse.ArgumentParser) -> None:
    safety = this.add_argument_group("which prompts are refused, and which pictures")
    safety.add_argument("--safety", default="words", choices=CHECKERS, help="the prompt checker (default words)")
    safety.add_argument("--safety-path", metavar="PATH", help="folder or hub id of that checker's weights")
    safety.add_argument(
        "--safety-images", default="off", choices=IMAGE_CHECKERS,
        help="judge each picture before it is shown, and switch previews off; nsfw finds explicit ones (default off)",
    )  # fmt: skip
    safety.add_argument("--safety-images-path", metavar="PATH", help="folder or hub id of that checker's weights")


def _port(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")


def _positive(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
