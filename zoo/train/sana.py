"""Train the small SANA from nothing: render, autoencoder, reading, flow matching with the text encoder.

    python -m zoo.train.sana --out runs/sana --minutes-render 1 --minutes-ae 2.5 --minutes-flow 4 --minutes 9.5

Each stage ends by the wall clock, and flow matching early enough for the whole run to end in `--minutes`.
Writes OUT/model (a diffusers folder, whole from the first stage on), OUT/samples (contact sheets) and OUT/logs (JSON
lines, curves). `--resume OLD/model` starts from a finished folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "configs" / "sana_tiny.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--set", action="append", default=[], metavar="flow.batch=512", help="change the configuration")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="a model folder to start from")
    parser.add_argument("--vae", type=Path, help="a folder with an autoencoder to start from; the rest starts anew")
    parser.add_argument("--minutes", type=float, help="of the whole run; without it the stages alone count")
    parser.add_argument("--minutes-render", type=float, default=1.0)
    parser.add_argument("--minutes-ae", type=float, default=2.5, help="0 keeps the autoencoder of --resume or --vae")
    parser.add_argument("--minutes-read", type=float, default=0.7, help="of the text encoder alone, before it paints")
    parser.add_argument("--minutes-flow", type=float, default=4.0, help="0 keeps the transformer and the text encoder")
    parser.add_argument("--max-steps", type=int, help="of each training stage, for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--workers", type=int, help="processes that write captions")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    # Worker processes import this module again: they must not wait for the training code.
    from zoo.train.sana_run import run

    run(args)


if __name__ == "__main__":
    main()
