"""Attention in 8 bits: queries, keys, values and probabilities in e4m3. An option; Hopper has a kernel for it.

A vector that all keys of a head have in common changes no probability, but takes the bits of what differs: the mean of
some keys is subtracted first, as SageAttention does with the mean of all (arXiv 2410.02367).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.ops.backends import cuda_kernels
from engine.ops.cuda import check
from engine.ops.heads import HEAD, angles, rotate_heads

__all__ = ["attention_8bit"]

# What numbers are multiplied with before they become e4m3, which holds 2^-6 to 448 in full: queries and keys after
# their norm are seldom above 16, probabilities never above 1.
_QK_SCALE, _V_SCALE, _P_SCALE, _LARGEST = 8.0, 4.0, 256.0, 448.0
_SAMPLED = 256  # keys whose mean is taken; kSampled in csrc/cuda/sm90a/attention_inputs.cuh

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define(
    "attention_8bit(Tensor qkv, Tensor? text, Tensor[] norms, Tensor cosine, Tensor sine, float eps) -> Tensor"
)
_attention_8bit = torch.ops.nibble.attention_8bit.default


def attention_8bit(
    qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of rotate_heads' query, key and value, (B, T, H D) in the dtype of qkv.

    Arguments are those of rotate_heads.
    """
    return _attention_8bit(qkv, text, norms, cosine, sine, eps)


def _plain(qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    parts = rotate_heads(qkv.float(), None if text is None else text.float(), norms, cosine, sine, eps)
    query, key, value = (part.transpose(1, 2) for part in parts)  # (B, H, T, D)
    tokens = key.shape[2]
    count = min(tokens, _SAMPLED)
    sampled = torch.arange(count, device=key.device) * tokens // count
    key = key - key[:, :, sampled].mean(2, keepdim=True)
    scores = _e4m3(query * _QK_SCALE) @ _e4m3(key * _QK_SCALE).mT / (_QK_SCALE**2 * query.shape[-1] ** 0.5)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * _P_SCALE
    out = _e4m3(weights) @ _e4m3(value * _V_SCALE) / (weights.sum(-1, keepdim=True) * _V_SCALE)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn).float()


def _launch(qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    module = cuda_kernels()
    hopper = torch.cuda.get_device_capability(qkv.device)[0] == 9
    if module is None or not hopper or qkv.dtype != torch.bfloat16 or cosine.shape[-1] != HEAD:
        return _plain(qkv, text, norms, cosine, sine, eps)
    (batch, length, width), words = qkv.shape, 0 if text is None else text.shape[1]
    heads, tokens = width // 3 // HEAD, length + words
    padded = -(-tokens // 128) * 128
    qkv, rows = qkv.contiguous(), None if text is None else text.contiguous()
    weights = [weight.to(torch.bfloat16).contiguous() for weight in (*norms, *norms)[:4]]
    bytes_ = [qkv.new_empty(batch * heads, size, dtype=torch.uint8) for size in (tokens * HEAD,) * 2 + (padded * HEAD,)]
    mean = qkv.new_empty(batch * heads, HEAD, dtype=torch.float32)
    out = qkv.new_empty(batch, tokens, heads * HEAD)
    read = (rows, qkv, *weights, angles(cosine, sine), mean, *bytes_, out)
    addresses = [0 if part is None else part.data_ptr() for part in read]
    with torch.cuda.device(qkv.device):
        stream, sizes = torch.cuda.current_stream().cuda_stream, (batch, heads, tokens, words)
        check(module.attention_sm90a(addresses, sizes, eps, HEAD**-0.5, _QK_SCALE, _V_SCALE, stream))
    return out


_library.impl("attention_8bit", _plain, "CPU")
_library.impl("attention_8bit", _launch, "CUDA")


@torch.library.register_fake("nibble::attention_8bit", lib=_library)
def _(qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float) -> Tensor:
    tokens = qkv.shape[1] + (0 if text is None else text.shape[1])
    return qkv.new_empty(qkv.shape[0], tokens, qkv.shape[2] // 3)
