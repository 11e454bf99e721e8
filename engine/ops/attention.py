"""Attention whose probabilities and values are in e4m3; Hopper has a kernel for it.

Queries and keys stay 16-bit: in e4m3, even less the mean of the keys, they cost the small FLUX's pictures 3 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops import backends
from engine.ops.calls import check, kernels
from engine.ops.heads import HEAD

__all__ = ["EIGHT_BIT_FROM", "attention_8bit", "in_8bit"]

# From so many tokens on attention is more than a third of a step, and 8 bits are taken where nobody said otherwise:
# a twelfth of its time for 0.2 dB (bench/NOTES.md). A FLUX picture of 1408x1408 with 512 text tokens has 8,256.
EIGHT_BIT_FROM = 8192

# What numbers are multiplied with before they become e4m3, which holds 2^-6 to 448 in full.
_V_SCALE, _P_SCALE, _LARGEST = 4.0, 256.0, 448.0

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define("attention_8bit(Tensor query, Tensor key, Tensor value) -> Tensor")
_attention_8bit = torch.ops.nibble.attention_8bit.default


def attention_8bit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of query, key and value (B, T, H, D), as (B, T, H D) in their dtype."""
    return _attention_8bit(query, key, value)


def in_8bit(
    attention: str, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, head: int = HEAD
) -> bool:
    """Whether so many tokens, picture's and text's, go through attention_8bit: what "auto", "16bit" or "8bit" means.

    Nobody who leaves it at "auto" gets it where no kernel serves, or where another backend is taken than Hopper's.
    """
    pays = tokens >= EIGHT_BIT_FROM and dtype == torch.bfloat16 and head == HEAD
    return attention == "8bit" or (attention == "auto" and pays and backends.select(device).name == "sm90a")


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2).float() for part in (query, key, value))  # (B, H, T, D)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * _P_SCALE
    out = _e4m3(weights) @ _e4m3(v * _V_SCALE) / (weights.sum(-1, keepdim=True) * _V_SCALE)
    return out.transpose(1, 2).flatten(2).to(query.dtype)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float()


def _launch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if not _served(query.device) or query.dtype != torch.bfloat16 or query.shape[-1] != HEAD:
        return _plain(query, key, value)
    module = kernels()
    views = [part if _fits(part) else part.contiguous() for part in (query, key, value)]
    batch, tokens, heads, _ = query.shape
    scratch = query.new_empty(batch * heads * HEAD * -(-tokens // 128) * 128, dtype=torch.uint8)
    out = query.new_empty(batch, tokens, heads * HEAD)
    addresses = [part.data_ptr() for part in (*views, scratch, out)]
    strides = [stride for part in views for stride in (part.stride(1), part.stride(0))]
    with torch.cuda.device(query.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(module.attention_sm90a(addresses, strides, (batch, heads, tokens), HEAD**-0.5, _V_SCALE, stream))
    return out


def _served(device: torch.device) -> bool:
    return device.type == "cuda" and any(row.name == "sm90a" and row.runs for row in backends.table(device))


def _fits(part: Tensor) -> bool:
    """Whether heads lie side by side, and tokens on 16-byte borders."""
    dense = part.stride(3) == 1 and part.stride(2) == HEAD
    return dense and part.stride(1) % 8 == 0 and part.stride(0) % 8 == 0 and part.data_ptr() % 16 == 0


_library.impl("attention_8bit", _plain, "CPU")
_library.impl("attention_8bit", _launch, "CUDA")


@torch.library.register_fake("nibble::attention_8bit", lib=_library)
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])
