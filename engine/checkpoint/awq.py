"""Weight-only linears (W4A16) as pieces: the modulations of FLUX, and the linears of the T5 encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint import biases, packing
from engine.checkpoint.packing import pad, round_up
from engine.checkpoint.pieces import FLOAT16, Stored, Tensors, take

__all__ = ["AwqPiece", "T5Piece"]

_T5_GROUP = 128


@dataclass(frozen=True, eq=False)
class AwqPiece:
    """A weight-only linear (N, K). `chunks` > 1: stored rows interleave that many chunks and the bias carries +1.

    Scales are stored (groups, N); rows past K / group, with which some writers fill up, are not read.
    """

    prefix: str
    name: str
    n: int
    k: int
    chunks: int = 1
    bias: bool = True
    group: int = 64

    def stored(self) -> dict[str, Stored]:
        groups = self.k // self.group
        shapes = {
            "qweight": Stored((self.n // 4, self.k // 2), (torch.int32,)),
            "wscales": Stored((groups, self.n), FLOAT16, at_least=True),
            "wzeros": Stored((groups, self.n), FLOAT16, at_least=True),
        }
        if self.bias:
            shapes["bias"] = Stored((self.n,), FLOAT16)
        return {f"{self.prefix}.{part}": stored for part, stored in shapes.items()}

    def canonical(self) -> dict[str, tuple[int, ...]]:
        groups = self.k // self.group
        shapes: dict[str, tuple[int, ...]] = {"codes": (self.n, self.k // 2)}
        shapes |= {"scales": (self.n, groups), "zeros": (self.n, groups)}
        if self.bias:
            shapes["bias"] = (self.n,)
        return {f"{self.name}.{part}": shape for part, shape in shapes.items()}

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        groups = self.k // self.group
        plain = {"codes": packing.unpack_awq_codes(raw[f"{self.prefix}.qweight"], self.chunks)}
        for part, source in (("scales", "wscales"), ("zeros", "wzeros")):
            plain[part] = self._by_chunk(raw[f"{self.prefix}.{source}"][:groups].T)
        if self.bias:
            bias = self._by_chunk(raw[f"{self.prefix}.bias"])
            plain["bias"] = biases.subtract_one(bias, self.chunks).float() if self.chunks > 1 else bias
        return {f"{self.name}.{part}": value for part, value in plain.items()}

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        get = {part: take(tensors, f"{self.name}.{part}", shape) for part, shape in self._shapes().items()}
        plain = {
            "qweight": packing.pack_awq_codes(get["codes"], self.chunks),
            "wscales": self._interleave(get["scales"]).T.contiguous(),
            "wzeros": self._interleave(get["zeros"]).T.contiguous(),
        }
        if self.bias:
            bias = biases.add_one(get["bias"], self.chunks) if self.chunks > 1 else get["bias"]
            plain["bias"] = self._interleave(bias).to(get["scales"].dtype).contiguous()
        return {f"{self.prefix}.{part}": value for part, value in plain.items()}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name.rpartition(".")[2]: shape for name, shape in self.canonical().items()}

    def _by_chunk(self, rows: Tensor) -> Tensor:
        if self.chunks == 1:
            return rows.contiguous()
        return rows.reshape(self.n // self.chunks, self.chunks, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    def _interleave(self, rows: Tensor) -> Tensor:
        if self.chunks == 1:
            return rows
        return rows.reshape(self.chunks, self.n // self.chunks, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


@dataclass(frozen=True, eq=False)
class T5Piece:
    """A linear of the published T5 encoder: the same words seen as int16, groups of 128, scales filled up to 8 rows."""

    name: str
    n: int
    k: int

    def stored(self) -> dict[str, Stored]:
        groups = self.k // _T5_GROUP
        return {
            f"{self.name}.qweight": Stored((self.n // 4, self.k), (torch.int16,)),
            f"{self.name}.scales": Stored((groups, self.n), FLOAT16, at_least=True),
            f"{self.name}.scaled_zeros": Stored((groups, self.n), FLOAT16, at_least=True),
        }

    def canonical(self) -> dict[str, tuple[int, ...]]:
        groups = self.k // _T5_GROUP
        shapes = {"codes": (self.n, self.k // 2), "scales": (self.n, groups), "zeros": (self.n, groups)}
        return {f"{self.name}.{part}": shape for part, shape in shapes.items()}

    def optional(self) -> dict[str, tuple[int, ...]]:
        return {}

    def present(self, small: Tensors) -> set[str]:
        return set()

    def decode(self, raw: Tensors) -> dict[str, Tensor]:
        groups = self.k // _T5_GROUP
        return {
            f"{self.name}.codes": packing.unpack_awq_codes(raw[f"{self.name}.qweight"]),
            f"{self.name}.scales": raw[f"{self.name}.scales"][:groups].T.contiguous(),
            f"{self.name}.zeros": raw[f"{self.name}.scaled_zeros"][:groups].T.contiguous(),
        }

    def encode(self, tensors: Tensors) -> dict[str, Tensor]:
        get = {name.rpartition(".")[2]: take(tensors, name, shape) for name, shape in self.canonical().items()}
        rows = round_up(self.k // _T5_GROUP, 8)
        return {
            f"{self.name}.qweight": packing.pack_awq_codes(get["codes"]).view(torch.int16),
            f"{self.name}.scales": pad(get["scales"].T.contiguous(), (rows, self.n)),
            f"{self.name}.scaled_zeros": pad(get["zeros"].T.contiguous(), (rows, self.n)),
        }
