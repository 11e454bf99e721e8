"""Packed weights: one buffer a layer, tiled for a backend, and the way back to the canonical form.

Three tilings exist. "plain" holds the canonical tensors one after another (backend `reference`). "panel16" serves every
compiled CPU backend and sm80: 16 outputs side by side, in the order in which the inner loops read them (csrc/ops.h
draws it). "wgmma64" is Hopper's (wgmma64.py draws it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from engine.errors import ArgumentError
from engine.ops import wgmma64
from engine.ops.backends import CUDA_NAMES, NAMES
from engine.ops.canonical import AwqWeight, CanonicalLinear, join_nibbles, split_nibbles

__all__ = ["PackedAwq", "PackedLinear", "Section", "Spec", "pack", "pack_awq", "parse", "unpack", "unpack_awq"]

PANEL = 16
ALIGN = 64
_DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn, "u8": torch.uint8
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_TILINGS = {"reference": "plain", "sm90a": "wgmma64"}
# Which tensors of a canonical weight travel, in this order, with their dtype (or "-") in the key.
_FIELDS = {
    "svdq": ("codes", "wscales", "smooth", "lora_down", "lora_up", "bias", "wtscale", "wcscales"),
    "awq": ("codes", "scales", "zeros", "bias"),
}


@dataclass(frozen=True)
class Section:
    """Where one tensor lies in the buffer: byte offset, dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, blob: Tensor) -> Tensor:
        """View this section of `blob`."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return blob[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Spec:
    """What a buffer holds. `key` says it as one string, which is how it travels through torch.library."""

    family: str
    backend: str
    n: int
    k: int
    rank: int
    dtypes: tuple[str, ...]
    key: str = field(init=False, compare=False)  # svdq/avx512/3072/3072/32/u8,bf16,bf16,bf16,bf16,bf16,-,-

    def __post_init__(self) -> None:
        # Not a cached_property: torch.compile cannot trace the lock that those hold before Python 3.12.
        key = f"{self.family}/{self.backend}/{self.n}/{self.k}/{self.rank}/{','.join(self.dtypes)}"
        object.__setattr__(self, "key", key)

    @cached_property
    def tiling(self) -> str:
        """ "plain", "panel16" or "wgmma64"."""
        return _TILINGS.get(self.backend, "panel16")

    @cached_property
    def dtype_of(self) -> dict[str, torch.dtype]:
        """Canonical dtype of each tensor that is present."""
        pairs = zip(_FIELDS[self.family], self.dtypes, strict=True)
        return {field: _DTYPES[name] for field, name in pairs if name != "-"}

    @cached_property
    def sections(self) -> dict[str, Section]:
        """Every section of the buffer, in order."""
        shapes = {"plain": _plain, "panel16": _panel16, "wgmma64": _wgmma64}[self.tiling](self)
        sections, offset = {}, 0
        for name, (dtype, shape) in shapes.items():
            sections[name] = Section(offset, dtype, shape)
            size = math.prod(shape) * dtype.itemsize
            offset += -(-size // ALIGN) * ALIGN
        return sections

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        last = list(self.sections.values())[-1]
        return last.offset + -(-math.prod(last.shape) * last.dtype.itemsize // ALIGN) * ALIGN


@lru_cache(maxsize=4096)
def parse(key: str) -> Spec:
    """The inverse of Spec.key. Cached: the same key gives the same object."""
    family, backend, n, k, rank, dtypes = key.split("/")
    return Spec(family, backend, int(n), int(k), int(rank), tuple(dtypes.split(",")))


@dataclass(frozen=True, eq=False)
class _Packed:
    """A layer's one buffer (uint8), what it holds, and the dtype the layer computes for."""

    blob: Tensor
    spec: Spec
    dtype: torch.dtype

    @property
    def backend(self) -> str:
        """Name of the backend that can read the buffer."""
        return self.spec.backend

    @property
    def n(self) -> int:
        """Outputs."""
        return self.spec.n

    @property
    def k(self) -> int:
        """Inputs."""
        return self.spec.k

    @property
    def nbytes(self) -> int:
        """Bytes of the whole layer: codes, scales, low-rank factors, smoothing, bias, padding."""
        return self.blob.numel()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the layer by name, for registering as buffers."""
        return {"blob": self.blob}


@dataclass(frozen=True, eq=False)
class PackedLinear(_Packed):
    """An SVDQuant linear, tiled for a backend."""

    @property
    def rank(self) -> int:
        """Size of the low-rank branch; 0 without one."""
        return self.spec.rank

    @property
    def kind(self) -> str:
        """ "int4" or "nvfp4"."""
        return "nvfp4" if self.spec.dtype_of["wscales"] == torch.float8_e4m3fn else "int4"


@dataclass(frozen=True, eq=False)
class PackedAwq(_Packed):
    """A weight-only linear, tiled for a backend."""


def pack(linear: CanonicalLinear, backend: str, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    """Tile `linear` for `backend`; `dtype` is that of the tokens the layer will see.

    What a backend has no kernel for is packed for `reference`, and the result's `backend` says so: nvfp4 weights but on
    sm90a, and there INT4 codes of -8 and low-rank factors that are not bfloat16.
    Raises ArgumentError for an unknown backend or dtype.
    """
    if not _fits_wgmma64(linear) if backend == "sm90a" else linear.kind == "nvfp4":
        backend = "reference"
    spec = _spec_of("svdq", linear, backend, dtype, linear.rank)
    blob = _empty(spec, linear.codes.device)
    parts = spec.sections
    if spec.tiling == "plain":
        for name, section in parts.items():
            section.of(blob).copy_(getattr(linear, name))
        return PackedLinear(blob, spec, dtype)
    if spec.tiling == "wgmma64":
        _fill_wgmma64(linear, blob, parts)
        return PackedLinear(blob, spec, dtype)
    parts["codes"].of(blob).copy_(_tile_codes(split_nibbles(linear.codes) ^ 8))
    parts["scales"].of(blob).copy_(_tile_rows(linear.wscales))
    if linear.lora_down is not None and linear.lora_up is not None:
        parts["up"].of(blob).copy_(_tile_rows(linear.lora_up).unflatten(1, (-1, 2)).transpose(2, 3))
        parts["down"].of(blob).copy_(linear.lora_down.unflatten(1, (-1, 2)).permute(1, 0, 2))
    smooth = torch.ones(linear.k) if linear.smooth is None else linear.smooth.float()
    parts["smooth"].of(blob).copy_(smooth)
    parts["inv_smooth"].of(blob).copy_(1.0 / smooth)
    parts["bias"].of(blob).copy_(_padded_bias(linear.bias, spec.n))
    return PackedLinear(blob, spec, dtype)


def unpack(packed: PackedLinear) -> CanonicalLinear:
    """The canonical form of `packed`, equal bit for bit to what was packed."""
    spec, blob, parts = packed.spec, packed.blob, packed.spec.sections
    if spec.tiling == "plain":
        return CanonicalLinear(**{name: section.of(blob).clone() for name, section in parts.items()})
    if spec.tiling == "wgmma64":
        return _from_wgmma64(spec, blob)
    tensors = {
        "codes": join_nibbles(_untile_codes(parts["codes"].of(blob), spec.n) ^ 8),
        "wscales": _untile_rows(parts["scales"].of(blob), spec.n),
    }
    if spec.rank:
        tensors["lora_up"] = _untile_rows(parts["up"].of(blob).transpose(2, 3).flatten(1, 2), spec.n)
        tensors["lora_down"] = parts["down"].of(blob).permute(1, 0, 2).flatten(1)
    for name in ("smooth", "bias"):
        if name in spec.dtype_of:
            tensors[name] = parts[name].of(blob).flatten()[: spec.k if name == "smooth" else spec.n]
    return CanonicalLinear(**{name: _own(t, spec.dtype_of[name]) for name, t in tensors.items()})


def pack_awq(weight: AwqWeight, backend: str, dtype: torch.dtype = torch.bfloat16) -> PackedAwq:
    """Tile a weight-only linear for `backend`; `dtype` is that of the tokens. Raises ArgumentError as pack() does.

    sm90a has no kernel of its own for it and takes that of sm80, which runs there too.
    """
    backend = "sm80" if backend == "sm90a" else backend
    spec = _spec_of("awq", weight, backend, dtype, 0)
    blob = _empty(spec, weight.codes.device)
    parts = spec.sections
    if spec.tiling == "plain":
        for name, section in parts.items():
            section.of(blob).copy_(getattr(weight, name))
        return PackedAwq(blob, spec, dtype)
    parts["codes"].of(blob).copy_(_tile_codes(split_nibbles(weight.codes)))
    parts["scales"].of(blob).copy_(_tile_rows(weight.scales))
    parts["zeros"].of(blob).copy_(_tile_rows(weight.zeros))
    parts["bias"].of(blob).copy_(_padded_bias(weight.bias, spec.n))
    return PackedAwq(blob, spec, dtype)


def unpack_awq(packed: PackedAwq) -> AwqWeight:
    """The canonical form of `packed`, equal bit for bit to what was packed."""
    spec, blob, parts = packed.spec, packed.blob, packed.spec.sections
    if spec.tiling == "plain":
        return AwqWeight(**{name: section.of(blob).clone() for name, section in parts.items()})
    tensors = {name: _untile_rows(parts[name].of(blob), spec.n) for name in ("scales", "zeros")}
    tensors["codes"] = join_nibbles(_untile_codes(parts["codes"].of(blob), spec.n))
    if "bias" in spec.dtype_of:
        tensors["bias"] = parts["bias"].of(blob).flatten()[: spec.n]
    return AwqWeight(**{name: _own(t, spec.dtype_of[name]) for name, t in tensors.items()})


def _spec_of(family: str, weight: CanonicalLinear | AwqWeight, backend: str, dtype: torch.dtype, rank: int) -> Spec:
    if backend not in (*NAMES, *CUDA_NAMES):
        raise ArgumentError(f"backend: expected one of {', '.join((*NAMES, *CUDA_NAMES))}, got {backend!r}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ArgumentError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    tensors = [getattr(weight, field) for field in _FIELDS[family]]
    names = tuple("-" if tensor is None else _NAMES[tensor.dtype] for tensor in tensors)
    return parse(Spec(family, backend, weight.n, weight.k, rank, names).key)


def _plain(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    n, k, rank = spec.n, spec.k, spec.rank
    group = 16 if spec.dtype_of.get("wscales") == torch.float8_e4m3fn else 64
    shapes = {
        "codes": (n, k // 2), "wscales": (n, k // group), "scales": (n, k // group), "zeros": (n, k // group),
        "smooth": (k,), "lora_down": (rank, k), "lora_up": (n, rank), "bias": (n,), "wtscale": (1,), "wcscales": (n,),
    }  # fmt: skip
    return {name: (dtype, shapes[name]) for name, dtype in spec.dtype_of.items()}


def _panel16(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Sections in the order csrc/ops.h names them; `smooth` is kept for the way back."""
    panels, k, rank, dtype = -(-spec.n // PANEL), spec.k, spec.rank, spec.dtype_of
    codes = (torch.uint8, (panels, k // 8, PANEL, 4))
    scales = (panels, k // 64, PANEL)
    bias = (torch.float32, (panels, PANEL))
    if spec.family == "awq":
        return {"codes": codes, "scales": (dtype["scales"], scales), "zeros": (dtype["zeros"], scales), "bias": bias}
    low_rank = dtype.get("lora_up", torch.bfloat16)
    return {
        "codes": codes,
        "scales": (dtype["wscales"], scales),
        "up": (low_rank, (panels, rank // 2, PANEL, 2)),
        "down": (low_rank, (k // 2, rank, 2)),
        "inv_smooth": (torch.float32, (k,)),
        "bias": bias,
        "smooth": (torch.float32, (k,)),
    }


def _wgmma64(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Sections in the order of LinearFp8 and QuantizeTarget in csrc/cuda/kernels.h; `smooth` is for the way back."""
    n, k = (-(-size // wgmma64.GRAIN) * wgmma64.GRAIN for size in (spec.n, spec.k))
    nvfp4 = spec.dtype_of["wscales"] == torch.float8_e4m3fn
    # For the way back, and a row's largest scale without the factors, which it has in row_most.
    own = {
        name: (spec.dtype_of[name], (size,))
        for name, size in (("wtscale", 1), ("wcscales", n))
        if name in spec.dtype_of
    }
    return {
        "codes": (torch.uint8, (n // 64, k // 64, 128, 16)),
        "scales": (spec.dtype_of["wscales"], (n // 64, k // 64, *((4,) if nvfp4 else ()), 64)),
        "up": (torch.bfloat16, (n, spec.rank)),
        "down": (torch.bfloat16, (spec.k // 32, spec.rank // 8, 8, 32)),
        "inv_smooth": (torch.float32, (spec.k,)),
        "bias": (torch.float32, (n,)),
        "row_most": (torch.float32, (n,)),
        "smooth": (torch.float32, (spec.k,)),
        **({"raw_most": (torch.float32, (n,))} if nvfp4 else {}),
        **own,
    }


def _fits_wgmma64(linear: CanonicalLinear) -> bool:
    low_rank = linear.lora_down is None or linear.lora_down.dtype == torch.bfloat16
    return low_rank and (linear.kind == "nvfp4" or wgmma64.fits(split_nibbles(linear.codes)))


def _fill_wgmma64(linear: CanonicalLinear, blob: Tensor, parts: dict[str, Section]) -> None:
    smooth = torch.ones(linear.k, device=blob.device) if linear.smooth is None else linear.smooth.float()
    nvfp4, most = linear.kind == "nvfp4", linear.wscales.float().abs().amax(1)
    parts["codes"].of(blob).copy_(wgmma64.tile_codes(split_nibbles(linear.codes), e2m1=nvfp4))
    parts["scales"].of(blob).copy_(wgmma64.tile_scales(linear.wscales))
    if nvfp4:
        parts["raw_most"].of(blob)[: linear.n].copy_(most)
        for name in ("wtscale", "wcscales"):
            factor = getattr(linear, name)
            if factor is not None:
                parts[name].of(blob)[: len(factor)].copy_(factor)
                most = most * factor.float()
    parts["row_most"].of(blob)[: linear.n].copy_(most)
    parts["smooth"].of(blob).copy_(smooth)
    parts["inv_smooth"].of(blob).copy_(1.0 / smooth)
    if linear.bias is not None:
        parts["bias"].of(blob)[: linear.n].copy_(linear.bias)
    if linear.lora_down is not None and linear.lora_up is not None:
        parts["up"].of(blob)[: linear.n].copy_(linear.lora_up)
        # What a warp of the kernel takes at once lies together: eight ranks of 32 inputs.
        parts["down"].of(blob).copy_(linear.lora_down.unflatten(0, (-1, 8)).unflatten(2, (-1, 32)).permute(2, 0, 1, 3))


def _from_wgmma64(spec: Spec, blob: Tensor) -> CanonicalLinear:
    section = {name: part.of(blob) for name, part in spec.sections.items()}
    tensors = {
        "codes": join_nibbles(wgmma64.untile_codes(section["codes"], spec.n, spec.k, e2m1="raw_most" in section)),
        "wscales": wgmma64.untile_scales(section["scales"], spec.n, spec.k),
        "smooth": section["smooth"],
        "bias": section["bias"][: spec.n],
    }
    tensors |= {name: section[name][:size] for name, size in (("wtscale", 1), ("wcscales", spec.n)) if name in section}
    if spec.rank:
        tensors |= {
            "lora_up": section["up"][: spec.n],
            "lora_down": section["down"].permute(1, 2, 0, 3).flatten(2).flatten(0, 1),
        }
    kept = {name: value for name, value in tensors.items() if name in spec.dtype_of}
    return CanonicalLinear(**{name: _own(value, spec.dtype_of[name]) for name, value in kept.items()})


def _empty(spec: Spec, device: torch.device) -> Tensor:
    return torch.zeros(spec.nbytes, dtype=torch.uint8, device=device)


def _own(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _tile_rows(rows: Tensor) -> Tensor:
    """(N, C) -> (panels, C, 16), zeros past N."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2)


def _untile_rows(tiles: Tensor, n: int) -> Tensor:
    return tiles.transpose(1, 2).flatten(0, 1)[:n]


def _tile_codes(nibbles: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (panels, K/8, 16, 4) bytes: low nibble input 8b+j, high nibble input 8b+4+j."""
    padded = torch.nn.functional.pad(nibbles, (0, 0, 0, -nibbles.shape[0] % PANEL))
    blocks = padded.unflatten(1, (-1, 2, 4)).unflatten(0, (-1, PANEL)).permute(0, 2, 1, 4, 3)
    return blocks[..., 0] | (blocks[..., 1] << 4)


def _untile_codes(tiles: Tensor, n: int) -> Tensor:
    blocks = torch.stack((tiles & 15, tiles >> 4), dim=-1).permute(0, 2, 1, 4, 3)
    return blocks.reshape(-1, tiles.shape[1] * 8)[:n]


def _padded_bias(bias: Tensor | None, n: int) -> Tensor:
    padded = torch.zeros(-(-n // PANEL) * PANEL)
    if bias is not None:
        padded[:n] = bias
    return padded.view(-1, PANEL)
