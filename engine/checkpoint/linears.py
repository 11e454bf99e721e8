"""W4A4 linears with a low-rank branch as pieces of the published layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint import biases, packing
from engine.checkpoint.packing import pad, round_up
from engine.checkpoint.pieces import FLOAT16, FLOATS, FP8, Stored, Tensors, same_bits, take
from engine.errors import CheckpointError

__all__ = ["GROUPS", "NUNCHAKU_NAMES", "Part", "SvdqPiece"]

GROUPS: Mapping[str, int] = {"int4": 64, "nvfp4": 16}
NUNCHAKU_NAMES: Mapping[str, str] = {
    "codes": "qweight",
    "wscales": "wscales",
    "wtscale": "wtscale",
    "wcscales": "wcscales",
    "bias": "bias",
    "smooth": "smooth",
    "smooth_orig": "smooth_orig",
    "lora_down": "lora_down",
    "lora_up": "lora_up",
}
Rows = slice | Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One diffusers linear inside a stored one: its rows there, and whether the dense layer has a bias.

    "maybe" is for a layer that has none, but whose stored bias counts when it is not zero.
    """

    name: str
    rows: Rows
    bias: Literal["yes", "no", "maybe"] = "yes"

    @property
    def n(self) -> int:
        """Rows of this part."""
        return self.rows.stop - self.rows.start if isinstance(self.rows, slice) else self.rows.numel()


@dataclass(frozen=True, eq=False)
class SvdqPiece:
    """A W4A4 linear of `n` rows over `k` inputs (before padding), holding one or more diffusers linears.

    `used_k` is the width of the diffusers linears where that is less than k. `shifted` says that the stored bias
    carries the GELU shift. `stored_rank` is the stored low-rank size where zeros fill it up from `rank`.
    """

    prefix: str
    parts: tuple[Part, ...]
    n: int
    k: int
    precision: str
    rank: int
    used_k: int = 0
    shifted: bool = False
    padded: bool = True
    stored_rank: int = 0
    names: Mapping[str, str] = field(default_factory=lambda: NUNCHAKU_NAMES)

    @property
    def width(self) -> int:
        """K of the diffusers linears."""
        return self.used_k or self.k

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return GROUPS[self.precision]

    def stored(self) -> dict[str, Stored]:
        n, k = self._padded()
        shapes = {
            "codes": Stored((n, k // 2), (torch.int8,)),
            "wscales": Stored((k // self.group, n), FP8 if self.precision == "nvfp4" else FLOAT16),
            "smooth": Stored((k,), FLOAT16),
            "bias": Stored((n,), FLOAT16, required=self._stores_bias()),
        }
        if "smooth_orig" in self.names:
            shapes["smooth_orig"] = Stored((k,), FLOAT16, required=False)
        if rank := self.stored_rank or self.rank:
            shapes |= {"lora_down": Stored((k, rank), FLOAT16), "lora_up": Stored((n, rank), FLOAT16)}
        if self.precision == "nvfp4":
            shapes |= {
                "wtscale": Stored((1,), FLOATS, required=False),
                "wcscales": Stored((n,), FLOAT16, required=False),
            }
        return {self._name(part): stored for part, stored in shapes.items()}

    def canonical(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        groups = -(-self.width // self.group)
        for part in self.parts:
            shapes[f"{part.name}.codes"] = (part.n, self.width // 2)
            shapes[f"{part.name}.wscales"] = (part.n, groups)
            shapes[f"{part.name}.smooth"] = (self.width,)
            if self.rank:
                shapes[f"{part.name}.lora_down"] = (self.rank, self.width)
                shapes[f"{part.name}.lora_up"] = (part.n, self.rank)
            if part.bias == "yes":
                shapes[f"{part.name}.bias"] = (part.n,)
        return shapes

    def optional(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for part in self.parts:
            shapes[f"{part.name}.smooth_orig"] = (self.width,)
            if self.precision == "nvfp4":
                shapes |= {f"{part.name}.wtscale": (1,), f"{part.name}.wcscales": (part.n,)}
            if part.bias == "maybe":
                shapes[f"{part.name}.bias"] = (part.n,)
        return shapes

    def present(self, small: Tensors) -> set[str]:
        there = {part: small[self._name(part)] for part in self.names if self._name(part) in small}
        found = {part for part in ("wtscale", "wcscales") if part in there}
        if "smooth_orig" in there:
            plain = [packing.unpack_vector(there[part])[: self.width] for part in ("smooth_orig", "smooth")]
            if not same_bits(*plain):
                found.add("smooth_orig")
        names = {f"{part.name}.{kind}" for part in self.parts for kind in found}
        if "bias" in there:
            bias = packing.unpack_vector(there["bias"])
            names |= {f"{p.name}.bias" for p in self.parts if p.bias == "maybe" and not _is_zero(bias[p.rows])}
        return names

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        plain = self._plain(raw)
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            for name in ("codes", "wscales", "lora_up", "wcscales", "bias"):
                if name in plain:
                    tensors[f"{part.name}.{name}"] = plain[name][part.rows]
            for name in ("smooth", "smooth_orig", "lora_down", "wtscale"):
                if name in plain:
                    tensors[f"{part.name}.{name}"] = plain[name]
            bias = tensors.get(f"{part.name}.bias")
            if bias is not None and (part.bias == "no" or (part.bias == "maybe" and _is_zero(bias))):
                del tensors[f"{part.name}.bias"]
        return tensors

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        n, k = self._padded()
        groups = -(-self.width // self.group)
        scales = self._stack(tensors, "wscales", (groups,), 1)
        codes = pad(self._stack(tensors, "codes", (self.width // 2,), 0), (n, k // 2))
        smooth = self._shared(tensors, "smooth", (self.width,))
        kind = smooth.dtype
        plain = {
            "codes": packing.pack_codes(codes),
            "wscales": self._pack_scales(pad(scales, (n, k // self.group), 1)),
            "smooth": packing.pack_vector(pad(smooth, (k,), 1)),
        }
        if "smooth_orig" in self.names:
            original = self._maybe_shared(tensors, "smooth_orig")
            plain["smooth_orig"] = packing.pack_vector(pad(smooth if original is None else original, (k,), 1))
        if self.rank:
            down, up = (
                self._shared(tensors, "lora_down", (self.rank, self.width)),
                self._stack(tensors, "lora_up", (self.rank,), 0),
            )
            rank = self.stored_rank or self.rank
            plain["lora_down"] = packing.pack_lora_down(pad(down, (rank, k)))
            plain["lora_up"] = packing.pack_lora_up(pad(up, (n, rank)))
        plain |= self._encode_factors(tensors, n, kind)
        if self._stores_bias():
            plain["bias"] = packing.pack_vector(pad(self._stored_bias(tensors).to(kind), (n,), 1))
        return {self._name(part): value for part, value in plain.items()}

    def _padded(self) -> tuple[int, int]:
        return (round_up(self.n), round_up(self.k)) if self.padded else (self.n, self.k)

    def _name(self, part: str) -> str:
        return f"{self.prefix}.{self.names[part]}"

    def _stores_bias(self) -> bool:
        return self.padded or any(part.bias != "no" for part in self.parts)

    def _plain(self, raw: Tensors) -> dict[str, Tensor]:
        """Unpacked and cut to the rows and columns in use; the bias without the GELU shift."""
        get = {part: raw[self._name(part)] for part in self.names if self._name(part) in raw}
        n, width, groups = self.n, self.width, -(-self.width // self.group)
        unpack_scales = packing.unpack_micro_scales if self.precision == "nvfp4" else packing.unpack_scales
        plain = {
            "codes": packing.unpack_codes(get["codes"])[:n, : width // 2],
            "wscales": unpack_scales(get["wscales"])[:n, :groups],
        }
        for part, size in (("smooth", width), ("smooth_orig", width), ("wcscales", n), ("bias", n)):
            if part in get:
                plain[part] = packing.unpack_vector(get[part])[:size]
        if "smooth_orig" in plain and same_bits(plain["smooth_orig"], plain["smooth"]):
            del plain["smooth_orig"]
        if "lora_down" in get and self.rank:
            plain["lora_down"] = packing.unpack_lora_down(get["lora_down"])[: self.rank, :width]
            plain["lora_up"] = packing.unpack_lora_up(get["lora_up"])[:n, : self.rank]
        if "wtscale" in get:
            plain["wtscale"] = get["wtscale"]
        if self.shifted and "bias" in plain:
            shift = biases.shift_of(plain["codes"], plain["wscales"], plain["smooth"])
            plain["bias"] = (plain["bias"].double() + shift).float()
        return plain

    def _pack_scales(self, scales: Tensor) -> Tensor:
        return packing.pack_micro_scales(scales) if self.precision == "nvfp4" else packing.pack_scales(scales)

    def _stored_bias(self, tensors: Tensors) -> Tensor:
        whole = torch.zeros(self.n, dtype=torch.float64, device=tensors[f"{self.parts[0].name}.codes"].device)
        for part in self.parts:
            if f"{part.name}.bias" in tensors:
                whole[part.rows] = take(tensors, f"{part.name}.bias", (part.n,)).double()
        if self.shifted:
            for part in self.parts:
                start = part.name
                whole[part.rows] -= biases.shift_of(
                    tensors[f"{start}.codes"], tensors[f"{start}.wscales"], tensors[f"{start}.smooth"]
                )
        return whole

    def _encode_factors(self, tensors: Tensors, n: int, kind: torch.dtype) -> dict[str, Tensor]:
        """wtscale where the parts agree on one, wcscales where they do not or have their own."""
        found = [tensors.get(f"{part.name}.wtscale") for part in self.parts]
        factors: dict[str, Tensor] = {}
        agree = all(f is not None and found[0] is not None and same_bits(f, found[0]) for f in found)
        if agree and found[0] is not None:
            factors["wtscale"] = found[0]
        per_row = [tensors.get(f"{part.name}.wcscales") for part in self.parts]
        if any(rows is not None for rows in per_row) or (not agree and any(f is not None for f in found)):
            whole = torch.ones(n, device=tensors[f"{self.parts[0].name}.codes"].device)
            for part, rows, factor in zip(self.parts, per_row, found, strict=True):
                value = torch.ones(part.n, device=whole.device) if rows is None else rows.float()
                whole[part.rows] = value if agree or factor is None else value * factor.float()
            factors["wcscales"] = packing.pack_vector(whole.to(kind))
        return factors

    def _stack(self, tensors: Tensors, part: str, rest: tuple[int, ...], fill: float) -> Tensor:
        """Put the parts' rows where they are stored; rows between them hold `fill`."""
        found = [take(tensors, f"{p.name}.{part}", (p.n, *rest)) for p in self.parts]
        if isinstance(self.parts[0].rows, slice) and self.parts[0].n == self.n:
            return found[0]
        whole = pad(found[0][:0], (self.n, *rest), fill)
        raw = whole.view(torch.uint8) if whole.element_size() == 1 else whole
        for p, rows in zip(self.parts, found, strict=True):
            raw[p.rows] = rows.view(torch.uint8) if rows.element_size() == 1 else rows
        return whole

    def _maybe_shared(self, tensors: Tensors, part: str) -> Tensor | None:
        found = [tensors.get(f"{p.name}.{part}") for p in self.parts]
        first = found[0]
        for p, other in zip(self.parts, found, strict=True):
            if (first is None) != (other is None) or (
                first is not None and other is not None and not same_bits(first, other)
            ):
                raise CheckpointError(
                    f"{p.name}.{part} differs from that of {self.parts[0].name}, but {self.prefix} stores one for both"
                )
        return first

    def _shared(self, tensors: Tensors, part: str, shape: tuple[int, ...]) -> Tensor:
        self._maybe_shared(tensors, part)
        return take(tensors, f"{self.parts[0].name}.{part}", shape)


def _is_zero(tensor: Tensor) -> bool:
    return not bool(tensor.contiguous().view(torch.uint8).any())
