"""Write a 4-bit FLUX.1-dev of random codes in the published layout: full size, with nothing to download.

    python bench/synthetic_flux.py svdq-int4_r32-flux.1-dev.safetensors            6.6 GiB
    python bench/synthetic_flux.py small.safetensors --width 256 --blocks 1 2      for trials

Random codes paint noise; what can be learned from such a file is how long it takes to open and how fast it runs.
A layer at a time is made and written, so little memory is needed. The same seed writes the same file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.flux_step import CONFIG, random_layer
from engine.checkpoint.files import INDEX_NAME
from engine.checkpoint.quantization import Quantization
from engine.checkpoint.translate import convert
from engine.checkpoint.writer import FolderWriter
from engine.models import flux
from engine.models.plan import get_linear

SHARD_BYTES = 2 * 2**30


def tensors(config: dict[str, Any], rank: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a canonical checkpoint, a layer at a time."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = flux.prepare(FluxTransformer2DModel(**config))
    generator, left = torch.Generator().manual_seed(seed), set(model.state_dict())
    for group in flux.plan(model):
        shared: dict[str, Tensor] = {}
        for name in group.names:
            linear = get_linear(model, name)
            left -= {f"{name}.weight", f"{name}.bias"}
            layer = random_layer(linear.out_features, linear.in_features, group.kind, rank, linear.bias is not None,
                                 "cpu", generator)  # fmt: skip
            parts = {part: value for part, value in vars(layer).items() if value is not None}
            if group.kind == "svdq":
                shared = shared or {part: parts[part] for part in ("smooth", "lora_down")}
                parts |= shared
            for part, value in parts.items():
                yield f"{name}.{part}", value
    for name, parameter in model.state_dict().items():
        if name in left:
            yield name, torch.randn(parameter.shape, generator=generator).bfloat16() * 0.02


def write(out: Path, config: dict[str, Any], rank: int, seed: int) -> None:
    """Write `out`, a `.safetensors` file in the published layout or a folder in the older one."""
    details = Quantization("FluxTransformer2DModel", config, "int4", 64, rank)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=f".{out.name}-") as scratch:
        with FolderWriter(Path(scratch), 8192, details.metadata(), SHARD_BYTES) as writer:
            for name, tensor in tensors(config, rank, seed):
                writer.add(name, tensor)
        assert (Path(scratch) / INDEX_NAME).exists()
        convert(scratch, str(out), "nunchaku")


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--width", type=int, default=3072, help="a multiple of 128")
    parser.add_argument("--blocks", type=int, nargs=2, default=[19, 38], metavar=("DOUBLE", "SINGLE"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.width % 128 or options.width < 128:
        parser.error(f"--width: expected a multiple of 128, got {options.width}")
    sizes = {"num_attention_heads": options.width // 128, "num_layers": options.blocks[0]}
    write(options.out, CONFIG | sizes | {"num_single_layers": options.blocks[1]}, options.rank, options.seed)
    print(f"{options.out}: {options.out.stat().st_size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
