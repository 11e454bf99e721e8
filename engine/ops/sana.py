"""Passes between the linears of SANA's blocks. On a CUDA device in bfloat16 they are kernels, elsewhere plain torch.

depthwise_glu is the middle of the feed-forward, linear_attention the self-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops.backends import takes_kernels
from engine.ops.calls import check, kernels

__all__ = ["depthwise_glu", "linear_attention"]

_HEAD = 32  # elements of a head that the kernel takes
_RUN = 256  # tokens that the kernel sums at a time
_EPSILON = 1e-15

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define("depthwise_glu(Tensor x, Tensor weight, Tensor bias, int padded) -> Tensor")
_library.define("linear_attention(Tensor qkv, int heads) -> Tensor")
_depthwise_glu = torch.ops.nibble.depthwise_glu.default
_linear_attention = torch.ops.nibble.linear_attention.default


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor, padded: int) -> Tensor:
    """h = conv3x3(silu(x)), each channel with itself; value * silu(gate) of its halves, zeros after them.

    x (B, height, width, 2C), weight (2C, 1, 3, 3), bias (2C) -> (B, height, width, padded) with padded >= C.
    """
    if torch.is_grad_enabled() and any(part.requires_grad for part in (x, weight, bias)):
        return _plain_glu(x, weight, bias, padded)
    return _depthwise_glu(x, weight, bias, padded)


def linear_attention(qkv: Tensor, heads: int) -> Tensor:
    """SANA's self-attention (arXiv 2410.10629, section 2.2) of qkv (B, M, 3D) -> (B, M, D).

    out = (V relu(K)^T) relu(Q) / (sum_n relu(K)_n . relu(Q)), sums in float32.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _plain_attention(qkv, heads)
    return _linear_attention(qkv, heads)


def _plain_glu(x: Tensor, weight: Tensor, bias: Tensor, padded: int) -> Tensor:
    h = F.conv2d(F.silu(x).movedim(-1, 1), weight, bias, padding=1, groups=weight.shape[0])
    value, gate = h.movedim(1, -1).chunk(2, dim=-1)
    out = value * F.silu(gate)
    return F.pad(out, (0, padded - out.shape[-1])).contiguous()


def _plain_attention(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2).float() for part in qkv.chunk(3, dim=-1))
    q, k = F.relu(q), F.relu(k)
    attended = q @ (k.transpose(-1, -2) @ v)
    weight = q @ k.sum(dim=2).unsqueeze(-1)
    return (attended / (weight + _EPSILON)).transpose(1, 2).flatten(2).to(qkv.dtype)


def _launch_glu(x: Tensor, weight: Tensor, bias: Tensor, padded: int) -> Tensor:
    batch, height, width, both = x.shape
    odd = both % 4 or padded % 2 or tuple(weight.shape) != (both, 1, 3, 3)
    if not takes_kernels(x.device) or odd or any(part.dtype != torch.bfloat16 for part in (x, weight, bias)):
        return _plain_glu(x, weight, bias, padded)
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    made = x.new_empty(batch, height, width, padded)
    addresses = [part.data_ptr() for part in (x, weight, bias, made)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().depthwise_glu_sm80(addresses, (batch, height, width, both // 2, padded), stream))
    return made


def _launch_attention(qkv: Tensor, heads: int) -> Tensor:
    batch, tokens, width = qkv.shape
    if not takes_kernels(qkv.device) or qkv.dtype != torch.bfloat16 or width != 3 * heads * _HEAD:
        return _plain_attention(qkv, heads)
    qkv = qkv.contiguous()
    sums = qkv.new_empty((batch, heads, -(-tokens // _RUN), _HEAD + 1, _HEAD), dtype=torch.float32)
    made = qkv.new_empty(batch, tokens, heads * _HEAD)
    addresses = [part.data_ptr() for part in (qkv, sums, made)]
    with torch.cuda.device(qkv.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().linear_attention_sm80(addresses, (tokens, _RUN, batch, heads), _EPSILON, stream))
    return made


_library.impl("depthwise_glu", _plain_glu, "CPU")
_library.impl("depthwise_glu", _launch_glu, "CUDA")
_library.impl("linear_attention", _plain_attention, "CPU")
_library.impl("linear_attention", _launch_attention, "CUDA")


@torch.library.register_fake("nibble::depthwise_glu", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor, padded: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], padded))


@torch.library.register_fake("nibble::linear_attention", lib=_library)
def _(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:-1], qkv.shape[-1] // 3))
