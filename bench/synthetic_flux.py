"""Write a 4-bit FLUX.1-dev of random codes in the published layout: full size, with nothing to download.

    python bench/synthetic_flux.py svdq-int4_r32-flux.1-dev.safetensors            6.3 GiB
    python bench/synthetic_flux.py small.safetensors --width 256 --blocks 1 2      for trials

Random codes paint noise; what can be learned from such a file is how long it takes to open and how fast it runs.
Stored tensors are cut from a few MiB of random numbers, so writing takes little more than the disk does, and little
memory. The same seed writes the same file.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.random_models import CONFIG
from engine.checkpoint import nunchaku
from engine.checkpoint.linears import GROUPS
from engine.checkpoint.pieces import Stored
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.writer import FileWriter

POOL = 2**22
# Last part of a stored name -> (middle, half width) of its values; others are like trained weights, about 0.02 each.
UNIFORM = {"wscales": (0.005, 0.002), "wtscale": (0.005, 0.0), "wcscales": (1.0, 0.1), "smooth": (1.0, 0.5)}
MICRO_SCALES = (1.0, 0.4)
MODULATION_SCALE = 0.005


class Pools:
    """Random numbers drawn once and handed out from random places."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._places = random.Random(seed)
        # Each twice in a row, so that a run of up to POOL numbers can begin anywhere.
        # Published writers emit -7..7: the code -8 does not occur.
        low, high = (torch.randint(0, 15, (POOL,), dtype=torch.uint8, generator=generator) + 9 & 15 for _ in range(2))
        self._bytes = (low | high << 4).repeat(2)
        self._normal = torch.randn(POOL, generator=generator).mul_(0.02).bfloat16().repeat(2)
        self._even = torch.rand(POOL, generator=generator).mul_(2).sub_(1).repeat(2)

    def stored(self, name: str, kind: Stored) -> Tensor:
        """A tensor that could stand under the stored `name`."""
        dtype, shape, part = kind.dtypes[0], kind.shape, name.rpartition(".")[2]
        if not dtype.is_floating_point:
            raw = self._cut(self._bytes, shape, dtype.itemsize)
            return raw.view(dtype).view(shape)
        if ".norm" in name and part in ("wscales", "wzeros"):  # weight-only: codes 0..14 stand for -7..7
            return torch.full(shape, MODULATION_SCALE * (-7 if part == "wzeros" else 1), dtype=dtype)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            return torch.ones(shape, dtype=dtype)
        if part in UNIFORM:
            middle, half = MICRO_SCALES if part == "wscales" and dtype.itemsize == 1 else UNIFORM[part]
            return (self._cut(self._even, shape) * half + middle).to(dtype).view(shape)
        return self._cut(self._normal, shape).view(shape)

    def _cut(self, pool: Tensor, shape: tuple[int, ...], times: int = 1) -> Tensor:
        count = torch.Size(shape).numel() * times
        start = 64 * self._places.randrange(POOL // 64)  # dtypes of several bytes need aligned places
        if count <= POOL:
            return pool[start : start + count]
        return pool[start : start + POOL].repeat(-(-count // POOL))[:count]


def write(out: Path, config: dict[str, Any], precision: str, rank: int, seed: int) -> None:
    """Write the `.safetensors` file `out` in the published layout."""
    details = Quantization("FluxTransformer2DModel", config, precision, GROUPS[precision], rank)
    pieces = nunchaku.pieces_for(details.model_class, config, precision, rank, [])
    stored = {name: kind for piece in pieces for name, kind in piece.stored().items()}
    metadata, pools = nunchaku.metadata(details), Pools(seed)
    with FileWriter(out, len(stored), 0, metadata) as file, torch.inference_mode():
        smooth: dict[str, Tensor] = {}
        for name, kind in stored.items():
            layer, _, part = name.rpartition(".")
            if part == "smooth":
                smooth[layer] = pools.stored(name, kind)
            same = part in ("smooth", "smooth_orig")
            file.add(name, smooth[layer] if same else pools.stored(name, kind))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--precision", choices=tuple(GROUPS), default="int4")
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--blocks", type=int, nargs=2, default=[19, 38], metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--rank", type=int, default=32, help="a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.width % 128 or options.width < 128:
        parser.error(f"--width: expected a multiple of 128, got {options.width}")
    if options.rank % 16 or not 0 <= options.rank <= 1024:
        parser.error(f"--rank: expected a multiple of 16 up to 1024, got {options.rank}")
    if options.out.suffix != ".safetensors":
        parser.error(f"out: expected a name ending in .safetensors, got {options.out}")
    sizes = {"num_attention_heads": options.width // 128, "num_layers": options.blocks[0]}
    config = CONFIG | sizes | {"num_single_layers": options.blocks[1]}
    write(options.out, config, options.precision, options.rank, options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
