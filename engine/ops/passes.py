"""Passes over a transformer's streams that join several of torch's: what stands between the linears of a block.

rotate_heads prepares attention's inputs, gated_add ends a branch. On a CUDA device in bfloat16 each is one kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.backends import cuda_kernels
from engine.ops.cuda import check

__all__ = ["gated_add", "rotate_heads"]

_HEAD = 128  # elements of a head that the kernel takes

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define(
    "rotate_heads(Tensor qkv, Tensor? text, Tensor[] norms, Tensor cosine, Tensor sine, float eps) -> Tensor[]"
)
_library.define("gated_add(Tensor x, Tensor gate, Tensor y, Tensor? y2=None) -> Tensor")
_rotate_heads = torch.ops.nibble.rotate_heads.default
_gated_add = torch.ops.nibble.gated_add.default


def rotate_heads(
    qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, T, H, D) of a joint sequence, text first; query and key normed and rotated.

    qkv (B, M, 3 H D) and text (B, L, 3 H D) or None are projections; norms are the weights (D) of the RMS norms of
    query and key, of the picture, then of the text. cosine, sine (T, D) turn neighbours (2i, 2i+1), as FLUX does.
    """
    parts = _rotate_heads(qkv, text, norms, cosine, sine, eps)
    value = parts[2] if text is not None else qkv.chunk(3, dim=-1)[2].unflatten(-1, (-1, cosine.shape[-1]))
    return parts[0], parts[1], value


def gated_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    """x + gate * (y [+ y2]): x, y and y2 (B, T, K), gate (B, K), a stream and the branches that are added to it."""
    return _gated_add(x, gate, y, y2)


def _plain_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    return x + gate.unsqueeze(1) * (y if y2 is None else y + y2)


def _launch_add(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    module, parts = cuda_kernels(), (x, gate, y, *(() if y2 is None else (y2,)))
    if module is None or x.shape[-1] % 8 or any(part.dtype != torch.bfloat16 for part in parts):
        return _plain_add(x, gate, y, y2)
    x, y, y2 = x.contiguous(), y.contiguous(), None if y2 is None else y2.contiguous()
    if gate.stride(1) != 1 or gate.stride(0) % 8 or gate.data_ptr() % 16:
        gate = gate.contiguous()
    batch, tokens, k = x.shape
    made = torch.empty_like(x)
    addresses = [0 if part is None else part.data_ptr() for part in (x, gate, y, y2, made)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(module.gated_add_sm80(addresses, (batch * tokens, k, tokens, gate.stride(0)), stream))
    return made


def _plain_heads(
    qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float
) -> list[Tensor]:
    sources = [(qkv, norms[:2])] if text is None else [(text, norms[2:]), (qkv, norms[:2])]
    streams = []
    for source, weights in sources:
        query, key, value = (part.unflatten(-1, (-1, cosine.shape[-1])) for part in source.chunk(3, dim=-1))
        query, key = (F.rms_norm(part, part.shape[-1:], weight.to(part.dtype), eps)
                      for part, weight in zip((query, key), weights, strict=True))  # fmt: skip
        streams.append((query, key, value))
    query, key, value = (torch.cat(parts, dim=1) for parts in zip(*streams, strict=True))
    turned = [_turn(part, cosine, sine) for part in (query, key)]
    return turned if text is None else [*turned, value]


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack((-odd, even), -1).flatten(-2)
    return (x.float() * cosine[:, None] + across * sine[:, None]).to(x.dtype)


def _launch_heads(
    qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float
) -> list[Tensor]:
    module = cuda_kernels()
    if module is None or qkv.dtype != torch.bfloat16 or cosine.shape[-1] != _HEAD:
        return _plain_heads(qkv, text, norms, cosine, sine, eps)
    (batch, length, width), words = qkv.shape, 0 if text is None else text.shape[1]
    heads, tokens = width // 3 // _HEAD, length + words
    qkv, rows = qkv.contiguous(), None if text is None else text.contiguous()
    angles = [part.to(torch.float32).contiguous() for part in (cosine, sine)]
    weights = [weight.to(torch.bfloat16).contiguous() for weight in (*norms, *norms)[:4]]
    made = [qkv.new_empty(batch, tokens, heads, _HEAD) for _ in range(2 if text is None else 3)]
    read = (rows, qkv, *weights, *angles, *made)
    addresses = [0 if part is None else part.data_ptr() for part in read] + [0] * (3 - len(made))
    with torch.cuda.device(qkv.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(module.rotate_heads_sm80(addresses, (batch, heads, tokens, words), eps, stream))
    return made


_library.impl("rotate_heads", _plain_heads, "CPU")
_library.impl("rotate_heads", _launch_heads, "CUDA")
_library.impl("gated_add", _plain_add, "CPU")
_library.impl("gated_add", _launch_add, "CUDA")


@torch.library.register_fake("nibble::gated_add", lib=_library)
def _(x: Tensor, gate: Tensor, y: Tensor, y2: Tensor | None = None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("nibble::rotate_heads", lib=_library)
def _(qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float) -> list[Tensor]:
    head = cosine.shape[-1]
    tokens = qkv.shape[1] + (0 if text is None else text.shape[1])
    shape = (qkv.shape[0], tokens, qkv.shape[2] // 3 // head, head)
    return [qkv.new_empty(shape) for _ in range(2 if text is None else 3)]
