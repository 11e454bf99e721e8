"""The pass over a transformer's stream that ends a branch. On a CUDA device in bfloat16 it is one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops.backends import takes_kernels
from engine.ops.calls import check, kernels

__all__ = ["gated_add"]

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define("gated_add(Tensor x, Tensor gate, Tensor y, Tensor? y2=None) -> Tensor")
_gated_add = torch.ops.nibble.gated_add.default


def gated_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    """x + gate * (y [+ y2]): x, y and y2 (B, T, K), gate (B, K), a stream and the branches that are added to it."""
    return _gated_add(x, gate, y, y2)


def _plain_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    return x + gate.unsqueeze(1) * (y if y2 is None else y + y2)


def _launch_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    parts = (x, gate, y, *(() if y2 is None else (y2,)))
    if not takes_kernels(x.device) or x.shape[-1] % 8 or any(part.dtype != torch.bfloat16 for part in parts):
        return _plain_add(x, gate, y, y2)
    x, y, y2 = x.contiguous(), y.contiguous(), None if y2 is None else y2.contiguous()
    if gate.stride(1) != 1 or gate.stride(0) % 8 or gate.data_ptr() % 16:
        gate = gate.contiguous()
    batch, tokens, k = x.shape
    made = torch.empty_like(x)
    addresses = [0 if part is None else part.data_ptr() for part in (x, gate, y, y2, made)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().gated_add_sm80(addresses, (batch * tokens, k, tokens, gate.stride(0)), stream))
    return made


_library.impl("gated_add", _plain_add, "CPU")
_library.impl("gated_add", _launch_add, "CUDA")


@torch.library.register_fake("nibble::gated_add", lib=_library)
def _(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
