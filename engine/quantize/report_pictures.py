"""Before and after: the same prompts and the same noise in 16 and in 4 bits, and how far the pictures are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from engine.metrics import psnr, ssim
from engine.request import Request

__all__ = ["PROMPTS", "Column", "Painted", "difference", "paint"]

# Plain enough for the small models that ship and for the large ones.
PROMPTS = (
    "a large red metal sphere left of a small blue cube",
    "a green cone behind a purple cylinder",
    "two objects: a small yellow ball in front of a large grey cube",
    "a single large cyan cylinder",
)
GAIN = 8  # differences are shown this many times as large

Distance = Callable[[Image.Image, Image.Image], float]


@dataclass(frozen=True)
class Painted:
    """One picture and, unless it is the reference, its distance from it. Equal pictures have no PSNR."""

    prompt: str
    seed: int
    file: str
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None


@dataclass(frozen=True)
class Column:
    """All pictures of one precision: `label` names it, `weight_bytes` is its transformer in memory."""

    label: str
    backend: str
    weight_bytes: int
    pictures: list[Painted] = field(default_factory=list)

    def mean(self, measure: str) -> float | None:
        """Mean of psnr, ssim or lpips over the pictures that have it."""
        values = [value for picture in self.pictures if (value := getattr(picture, measure)) is not None]
        return fmean(values) if values else None


def paint(
    engine: Any,
    label: str,
    prompts: Sequence[str],
    steps: int | None,
    folder: Path,
    reference: Column | None,
    lpips: Distance | None,
    tell: Callable[[str, int, int], None],
) -> Column:
    """Paint every prompt with its number as seed, keep the files in `folder`, compare with the `reference` column."""
    folder.mkdir(parents=True, exist_ok=True)
    column = Column(label, engine.backend, engine.weight_bytes)
    for seed, prompt in enumerate(prompts):
        result = engine.run(Request(prompt, seed=seed, steps=steps))
        path = result.save(folder / f"{seed:02d}-{_slug(label)}.png")
        scores = _scores(folder / reference.pictures[seed].file, result.image, lpips) if reference else {}
        column.pictures.append(Painted(prompt, seed, path.name, **scores))
        tell(f"painting {label}", seed + 1, len(prompts))
    return column


def difference(first: Path, second: Path) -> Image.Image:
    """How far two pictures are apart at each pixel, `GAIN` times as large, black where they are equal."""
    a, b = (np.asarray(Image.open(path).convert("RGB"), dtype=np.int16) for path in (first, second))
    return Image.fromarray(np.clip(np.abs(a - b) * GAIN, 0, 255).astype(np.uint8))


def _scores(reference: Path, image: Image.Image, lpips: Distance | None) -> dict[str, float | None]:
    with Image.open(reference) as exact:
        decibels = psnr(exact, image)
        return {
            "psnr": decibels if np.isfinite(decibels) else None,
            "ssim": ssim(exact, image),
            "lpips": lpips(exact, image) if lpips else None,
        }


def _slug(label: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in label.lower())
