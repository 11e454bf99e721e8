"""4-bit checkpoints that do not ship: made of a small model's 16-bit weights when first asked for, and kept.

They lie in the user's cache folder, by the weights they were made of: other weights get a checkpoint of their own.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import CheckpointError
from engine.models.catalogue import ModelSpec, resolve
from engine.quantize.layer import Recipe
from engine.quantize.run import quantize_model
from engine.quantize.source import Weights, part_folder

__all__ = ["RECIPE", "cache_folder", "nvfp4"]

# No data and one round, as somebody waits for it; `python -m engine.quantize` takes its time and is closer to BF16.
RECIPE = Recipe(precision="nvfp4", alphas=(), rounds=1)


def cache_folder() -> Path:
    """Where they are kept: `nibble-studio` in the user's cache folder, which XDG_CACHE_HOME names."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nibble-studio"


def nvfp4(spec: ModelSpec, progress: Callable[[str], None] | None = None) -> Path:
    """The NVFP4 checkpoint of a small model; `progress` is told in words how the making of it goes.

    Whoever else is making the same one is waited for. Raises CheckpointError where it cannot be kept.
    """
    # Variants of a model are LoRAs on it and share its checkpoint.
    base, tell = resolve(spec.source), progress or (lambda _: None)
    mark = Weights(part_folder(base, "transformer")).fingerprint()[:16]
    place = cache_folder() / f"{Path(base.source).name}-nvfp4-{mark}"
    if place.is_dir():
        return place

    def told(stage: str, done: int, total: int) -> None:
        share = f", {100 * done // total} %" if total else ""
        tell(f"making the NVFP4 weights of {base.title} from its 16-bit ones, once{share}")

    told("", 0, 0)
    try:
        with _alone(place):
            if not place.is_dir():
                # On the CPU whatever the device: its bytes are then the same everywhere, and a GPU stays free.
                quantize_model(base, place, recipe=RECIPE, device="cpu", resume=True, progress=told)
    except OSError as error:
        raise CheckpointError(
            f"{place}: the NVFP4 checkpoint of {base.title} cannot be kept there ({error}); name another folder in"
            f" XDG_CACHE_HOME, or make it with python -m engine.quantize {base.source} --precision nvfp4 --out"
            f" {spec.checkpoints['nvfp4']}"
        ) from error
    return place


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold the making of `place` for this process."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f"{place.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
