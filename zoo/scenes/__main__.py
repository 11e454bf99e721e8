"""Draw a contact sheet of rendered scenes with their captions.

    python -m zoo.scenes --count 24 --out sheet.png
    python -m zoo.scenes --count 256 --device cuda --compile --split test --out sheet.png

Prints how many scenes a second are placed; the progress bar shows how many are drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from tqdm import tqdm

from zoo import scenes
from zoo.scenes.sheet import contact_sheet


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.scenes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24, help="how many scenes (default 24)")
    parser.add_argument("--seed", type=int, default=1, help="which scenes (default 1)")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="the sets of objects to draw from")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default 256)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--compile", action="store_true", help="fuse the arithmetic; pays off from about 10,000 scenes")
    parser.add_argument("--columns", type=int, default=6, help="pictures across the sheet (default 6)")
    parser.add_argument("--out", type=Path, default=Path("scenes.png"), help="the PNG to write (default scenes.png)")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    batch = scenes.sample(options.count, options.seed, options.split)
    print(f"{options.count / (time.perf_counter() - start):.0f} scenes a second placed")
    parts = []
    with tqdm(total=options.count, unit="picture") as bar:
        for part in scenes.stream(batch, options.size, options.device, compile=options.compile):
            parts.append(part.image)
            bar.update(len(part.image))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(torch.cat(parts), scenes.captions(batch, options.seed), options.columns).save(options.out)
    print(f"wrote {options.out}; fields of a scene: {', '.join(f.name for f in dataclasses.fields(batch))}")


if __name__ == "__main__":
    main()
