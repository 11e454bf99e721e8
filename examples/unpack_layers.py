"""Unpack single published layers and compare them with their plain form, where the file holds it beside them.

python examples/unpack_layers.py tests/data/pack_int4.safetensors
python examples/unpack_layers.py svdq-int4_r32-flux.1-dev.safetensors --only transformer_blocks.0.qkv_proj
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import packing
from engine.checkpoint.pieces import same_bits


def nibbles(codes: Tensor) -> Tensor:
    """One code per element -> two a byte, low nibble = even input."""
    return ((codes[:, 0::2].to(torch.int16) & 15) | ((codes[:, 1::2].to(torch.int16) & 15) << 4)).to(torch.uint8)


def unpack(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain tensors of a stored layer, whatever its kind."""
    weight = layer["qweight"]
    if weight.dtype in (torch.int32, torch.int16):
        groups = (
            weight.shape[1] * (2 if weight.dtype == torch.int32 else 1) // (64 if weight.dtype == torch.int32 else 128)
        )
        names = {"scales": ("wscales", "scales"), "zeros": ("wzeros", "scaled_zeros")}
        plain = {"codes": packing.unpack_awq_codes(weight)}
        for name, choices in names.items():
            stored = next(layer[choice] for choice in choices if choice in layer)
            plain[name] = stored[:groups].T.contiguous()
        return plain
    scales = layer["wscales"]
    unpack_scales = packing.unpack_scales if scales.element_size() == 2 else packing.unpack_micro_scales
    plain = {"codes": packing.unpack_codes(weight), "wscales": unpack_scales(scales)}
    for name in ("bias", "smooth", "wcscales"):
        if name in layer:
            plain[name] = packing.unpack_vector(layer[name])
    if "lora_down" in layer:
        plain["lora_down"] = packing.unpack_lora_down(layer["lora_down"])
        plain["lora_up"] = packing.unpack_lora_up(layer["lora_up"])
    return plain


def compare(prefix: str, layer: dict[str, Tensor]) -> bool:
    """Print what a layer's plain tensors are; False where one differs from the plain form in the file."""
    equal = True
    for name, value in unpack(layer).items():
        line = f"{prefix}.{name:10} {str(value.dtype).removeprefix('torch.'):13} {tuple(value.shape)}"
        wanted = layer.get(f"plain.{name}")
        if wanted is not None:
            wanted = nibbles(wanted) if name == "codes" else wanted
            inside = value[tuple(slice(0, size) for size in wanted.shape)]
            same = same_bits(inside, wanted)
            equal &= same
            line += "  equals plain" if same else "  DIFFERS from plain"
        print(line)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help=".safetensors of the published layout")
    parser.add_argument("--only", default="", metavar="PREFIX", help="layers whose name begins so (default: all)")
    options = parser.parse_args()
    if not options.file.is_file():
        parser.error(f"file: expected a .safetensors file, got {options.file}")
    with safe_open(options.file, "pt") as file:
        names = sorted(file.keys())
        prefixes = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
        prefixes = [prefix for prefix in prefixes if prefix.startswith(options.only)]
        if not prefixes:
            parser.error(f"file: {options.file} holds no 4-bit layer whose name begins with {options.only!r}")
        equal = True
        for prefix in prefixes:
            stored = {name.removeprefix(f"{prefix}."): name for name in names if name.startswith(f"{prefix}.")}
            equal &= compare(prefix, {key: file.get_tensor(name) for key, name in stored.items()})
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
