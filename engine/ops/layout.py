"""Packed weights: one buffer a layer, tiled for a backend, and the way back to the canonical form.

Four tilings exist, each in a module of its name: "plain" (backend `reference`), "panel16" (every compiled CPU backend,
and sm80), "wgmma64" (Hopper) and "mma64" (NVFP4 on consumer Blackwell).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ArgumentError
from engine.ops import wgmma64
from engine.ops.backends import CUDA_NAMES, NAMES
from engine.ops.canonical import AwqWeight, CanonicalLinear
from engine.ops.spec import DTYPE_NAMES, FIELDS, Spec, parse

__all__ = ["PackedAwq", "PackedLinear", "pack", "pack_awq", "unpack", "unpack_awq"]


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
    sm90a and sm120a, and on sm90a INT4 codes of -8 and low-rank factors that are not bfloat16. INT4 weights on sm120a
    take the kernels of sm80.
    Raises ArgumentError for an unknown backend or dtype.
    """
    if backend == "sm120a":
        backend = backend if linear.kind == "nvfp4" else "sm80"
    elif not wgmma64.takes(linear) if backend == "sm90a" else linear.kind == "nvfp4":
        backend = "reference"
    spec = _spec_of("svdq", linear, backend, dtype, linear.rank)
    return PackedLinear(_filled(linear, spec), spec, dtype)


def unpack(packed: PackedLinear) -> CanonicalLinear:
    """The canonical form of `packed`, equal bit for bit to what was packed."""
    return CanonicalLinear(**_read(packed))


def pack_awq(weight: AwqWeight, backend: str, dtype: torch.dtype = torch.bfloat16) -> PackedAwq:
    """Tile a weight-only linear for `backend`; `dtype` is that of the tokens. Raises ArgumentError as pack() does.

    sm90a and sm120a have no kernel of their own for it and take that of sm80, which runs there too.
    """
    spec = _spec_of("awq", weight, "sm80" if backend in ("sm90a", "sm120a") else backend, dtype, 0)
    return PackedAwq(_filled(weight, spec), spec, dtype)


def unpack_awq(packed: PackedAwq) -> AwqWeight:
    """The canonical form of `packed`, equal bit for bit to what was packed."""
    return AwqWeight(**_read(packed))


def _spec_of(family: str, weight: CanonicalLinear | AwqWeight, backend: str, dtype: torch.dtype, rank: int) -> Spec:
    if backend not in (*NAMES, *CUDA_NAMES):
        raise ArgumentError(f"backend: expected one of {', '.join((*NAMES, *CUDA_NAMES))}, got {backend!r}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ArgumentError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    tensors = [getattr(weight, field) for field in FIELDS[family]]
    names = tuple("-" if tensor is None else DTYPE_NAMES[tensor.dtype] for tensor in tensors)
    return parse(Spec(family, backend, weight.n, weight.k, rank, names).key)


def _filled(weight: CanonicalLinear | AwqWeight, spec: Spec) -> Tensor:
    blob = torch.zeros(spec.nbytes, dtype=torch.uint8, device=weight.codes.device)
    spec.tiling.fill(weight, spec.views(blob))
    return blob


def _read(packed: _Packed) -> dict[str, Tensor]:
    """Tensors of the canonical form by name, each in its own memory and dtype."""
    spec = packed.spec
    found = spec.tiling.read(spec, spec.views(packed.blob))
    return {
        name: found[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
        for name, dtype in spec.dtype_of.items()
    }
