"""W4A4 linears as the nunchaku_lite layout stores them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.checkpoint.linears import GROUPS, Part, SvdqPiece
from engine.checkpoint.pieces import FLOAT16, FLOATS, Stored, Tensors, same_bits, take
from engine.errors import CheckpointError

__all__ = ["LITE_NAMES", "DenseProjOutPiece", "LiteSvdqPiece", "ProjOutPiece"]

LITE_NAMES: Mapping[str, str] = {
    "codes": "qweight",
    "wscales": "wscales",
    "wtscale": "wtscale",
    "wcscales": "wcscales",
    "bias": "bias",
    "smooth": "smooth_factor",
    "lora_down": "proj_down",
    "lora_up": "proj_up",
}


@dataclass(frozen=True, eq=False)
class LiteSvdqPiece(SvdqPiece):
    """As SvdqPiece, except that nvfp4 layers always carry both wtscale and wcscales, ones if need be.

    Of rank 0 the factors are there too, without elements: diffusers asks for them.
    """

    def stored(self) -> dict[str, Stored]:
        shapes = {name: replace(stored, required=True) for name, stored in super().stored().items()}
        if not (self.stored_rank or self.rank):
            for part, size in (("lora_down", self.k), ("lora_up", self.n)):
                shapes[self._name(part)] = Stored((size, 0), FLOAT16, required=False)
        return shapes

    def present(self, small: Tensors) -> set[str]:
        if self.precision == "int4":
            return set()
        names = ("wtscale", "wcscales")
        factors = {f"{self.parts[0].name}.{name}": small[f"{self.prefix}.{name}"] for name in names}
        _drop_ones(factors, self.parts[0].name)
        return set(factors)

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        tensors = super().decode(raw)
        if self.precision == "nvfp4":
            _drop_ones(tensors, self.parts[0].name)
        return tensors

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        stored = super().encode(tensors)
        smooth = stored[self._name("smooth")]
        if not (self.stored_rank or self.rank):
            stored |= {self._name("lora_down"): smooth.new_empty(self.k, 0)}
            stored |= {self._name("lora_up"): smooth.new_empty(self.n, 0)}
        if self.precision == "nvfp4":
            kind = smooth.dtype
            for part, size in (("wtscale", 1), ("wcscales", self.n)):
                value = stored.get(f"{self.prefix}.{part}", torch.ones(size))
                stored[f"{self.prefix}.{part}"] = value.to(kind)
        return stored


def _drop_ones(tensors: dict[str, Tensor], name: str) -> None:
    rows, whole = f"{name}.wcscales", f"{name}.wtscale"
    if bool((tensors[rows] == 1).all()):
        del tensors[rows]
    elif bool((tensors[whole] == 1).all()):
        del tensors[whole]


@dataclass(frozen=True, eq=False)
class ProjOutPiece:
    """`proj_out` of a FLUX single block, one linear of K = 5D here and two (attention, MLP) in the canonical form.

    Splitting a stored one gives both halves its up-projection. Joining halves that have their own puts the two low-rank
    branches side by side, so the stored rank is twice the canonical one; such a file is split into what it was.
    """

    prefix: str
    width: int
    precision: str
    rank: int
    stored_rank: int

    @property
    def joined(self) -> bool:
        """Whether the stored branch is two branches side by side."""
        return self.stored_rank == 2 * self.rank and self.rank > 0

    def stored(self) -> dict[str, Stored]:
        return self._whole().stored()

    def canonical(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for part, k in (("attn", self.width), ("mlp", 4 * self.width)):
            start = f"{self.prefix}.{part}"
            shapes |= {
                f"{start}.codes": (self.width, k // 2),
                f"{start}.wscales": (self.width, k // GROUPS[self.precision]),
            }
            shapes[f"{start}.smooth"] = (k,)
            if self.rank:
                shapes |= {f"{start}.lora_down": (self.rank, k), f"{start}.lora_up": (self.width, self.rank)}
        shapes[f"{self.prefix}.mlp.bias"] = (self.width,)
        return shapes

    def optional(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {f"{self.prefix}.attn.bias": (self.width,)}
        for half, k in (("attn", self.width), ("mlp", 4 * self.width)):
            found[f"{self.prefix}.{half}.smooth_orig"] = (k,)
            if self.precision == "nvfp4":
                found |= {f"{self.prefix}.{half}.wtscale": (1,), f"{self.prefix}.{half}.wcscales": (self.width,)}
        return found

    def present(self, small: Tensors) -> set[str]:
        suffixes = (name.rpartition(".")[2] for name in self._whole().present(small))
        return {f"{self.prefix}.{half}.{suffix}" for suffix in suffixes for half in ("attn", "mlp")}

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        whole = {name.removeprefix(f"{self.prefix}."): value for name, value in self._whole().decode(raw).items()}
        columns = {"codes": self.width // 2, "wscales": self.width // GROUPS[self.precision], "smooth": self.width}
        tensors: dict[str, Tensor] = {}
        for part, cut in columns.items():
            tensors[f"{self.prefix}.attn.{part}"] = whole[part][..., :cut]
            tensors[f"{self.prefix}.mlp.{part}"] = whole[part][..., cut:]
        if self.rank:
            first, second = (slice(0, self.rank), slice(-self.rank, None)) if self.joined else (slice(None),) * 2
            for half, rows, cut in (("attn", first, slice(0, self.width)), ("mlp", second, slice(self.width, None))):
                tensors[f"{self.prefix}.{half}.lora_down"] = whole["lora_down"][rows, cut]
                tensors[f"{self.prefix}.{half}.lora_up"] = whole["lora_up"][:, rows]
        for part in ("wtscale", "wcscales"):
            if part in whole:
                tensors |= {f"{self.prefix}.{half}.{part}": whole[part] for half in ("attn", "mlp")}
        tensors[f"{self.prefix}.mlp.bias"] = whole["bias"]
        return tensors

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        shapes = self.canonical()
        start = self.prefix

        def both(part: str) -> list[Tensor]:
            return [
                take(tensors, f"{start}.{half}.{part}", shapes[f"{start}.{half}.{part}"]) for half in ("attn", "mlp")
            ]

        raw_scales = [value.view(torch.uint8) if value.element_size() == 1 else value for value in both("wscales")]
        whole = {
            "codes": torch.cat(both("codes"), 1),
            "wscales": torch.cat(raw_scales, 1).view(tensors[f"{start}.attn.wscales"].dtype),
            "smooth": torch.cat(both("smooth")),
            "bias": take(tensors, f"{start}.mlp.bias", (self.width,)),
        }
        if f"{start}.attn.bias" in tensors:
            whole["bias"] = whole["bias"].double() + tensors[f"{start}.attn.bias"].double()
        if self.rank:
            downs, ups = both("lora_down"), both("lora_up")
            joined = torch.block_diag(*downs).to(downs[0].dtype) if self.joined else torch.cat(downs, 1)
            whole |= {"lora_down": joined, "lora_up": torch.cat(ups, 1) if self.joined else ups[0]}
        whole |= self._factors(tensors)
        return self._whole().encode({f"{start}.{part}": value for part, value in whole.items()})

    def _whole(self) -> LiteSvdqPiece:
        part = Part(self.prefix, slice(0, self.width))
        return LiteSvdqPiece(
            self.prefix,
            (part,),
            self.width,
            5 * self.width,
            self.precision,
            self.stored_rank,
            padded=False,
            names=LITE_NAMES,
        )

    def _factors(self, tensors: Tensors) -> dict[str, Tensor]:
        found = {}
        for part in ("wtscale", "wcscales"):
            halves = [tensors.get(f"{self.prefix}.{half}.{part}") for half in ("attn", "mlp")]
            if halves[0] is None and halves[1] is None:
                continue
            if halves[0] is None or halves[1] is None or not same_bits(halves[0], halves[1]):
                raise CheckpointError(
                    f"{self.prefix}: its attention and MLP halves have different {part}, which nunchaku_lite cannot"
                    " hold, since they are one linear there; NVFP4 FLUX checkpoints stay in nunchaku's layout"
                )
            found[part] = halves[0]
        return found


@dataclass(frozen=True)
class DenseProjOutPiece:
    """`proj_out` of a FLUX single block kept in 16 bits: split by columns in the canonical form, whole here."""

    prefix: str
    width: int

    def stored(self) -> dict[str, Stored]:
        return {
            f"{self.prefix}.weight": Stored((self.width, 5 * self.width), FLOATS),
            f"{self.prefix}.bias": Stored((self.width,), FLOATS),
        }

    def canonical(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{self.prefix}.attn.weight": (self.width, self.width),
            f"{self.prefix}.mlp.weight": (self.width, 4 * self.width),
            f"{self.prefix}.mlp.bias": (self.width,),
        }

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        weight = raw[f"{self.prefix}.weight"]
        return {
            f"{self.prefix}.attn.weight": weight[:, : self.width],
            f"{self.prefix}.mlp.weight": weight[:, self.width :],
            f"{self.prefix}.mlp.bias": raw[f"{self.prefix}.bias"],
        }

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        attn, mlp, bias = (take(tensors, name, shape) for name, shape in self.canonical().items())
        return {f"{self.prefix}.weight": torch.cat((attn, mlp), 1), f"{self.prefix}.bias": bias}
