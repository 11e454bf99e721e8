"""Unpack single published layers and compare them with their plain form, where the file holds it beside them.

python examples/unpack_layers.py tests/data/pack_int4.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file
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


def main(path: str) -> int:
    tensors = load_file(path)
    failed = 0
    for prefix in sorted(name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")):
        layer = {
            name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")
        }
        for name, value in unpack(layer).items():
            line = f"{prefix}.{name:10} {str(value.dtype).removeprefix('torch.'):13} {tuple(value.shape)}"
            wanted = layer.get(f"plain.{name}")
            if wanted is not None:
                wanted = nibbles(wanted) if name == "codes" else wanted
                inside = value[tuple(slice(0, size) for size in wanted.shape)]
                equal = same_bits(inside, wanted)
                failed += not equal
                line += "  equals plain" if equal else "  DIFFERS from plain"
            print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
