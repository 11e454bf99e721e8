"""Queries, keys and values of a joint sequence: RMS norm of queries and keys, and rotation, as FLUX does it.

rotate_heads takes projections; project_heads takes what is quantized before them, and where a kernel can, norm and
rotation are the last thing that the product does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from engine.ops import cuda
from engine.ops.backends import takes_kernels
from engine.ops.calls import check, kernels
from engine.ops.reference import QuantizedAct
from engine.ops.spec import parse

if TYPE_CHECKING:
    from engine.ops.layout import PackedLinear

__all__ = ["HEAD", "angles", "project_heads", "projects_heads", "rotate_heads"]

HEAD = 128  # elements of a head that the kernels take

_library = torch.library.Library("nibble", "FRAGMENT")
_library.define(
    "rotate_heads(Tensor qkv, Tensor? text, Tensor[] norms, Tensor cosine, Tensor sine, float eps) -> Tensor[]"
)
_library.define(
    "project_heads(Tensor[] acts, Tensor[] blobs, str[] specs, Tensor[] norms, Tensor cosine, Tensor sine, float eps,"
    " int batch) -> Tensor"
)
_rotate_heads = torch.ops.nibble.rotate_heads.default
_project_heads = torch.ops.nibble.project_heads.default

Heads = tuple[Tensor, Tensor, Tensor]


def rotate_heads(
    qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float
) -> Heads:
    """Query, key and value (B, T, H, D) of a joint sequence, text first; query and key normed and rotated.

    qkv (B, M, 3 H D) and text (B, L, 3 H D) or None are projections; norms are the weights (D) of the RMS norms of
    query and key, of the picture, then of the text. cosine, sine (T, D), alike for both of a pair, turn neighbours
    (2i, 2i+1), as FLUX does.
    """
    parts = _rotate_heads(qkv, text, norms, cosine, sine, eps)
    value = parts[2] if text is not None else qkv.chunk(3, dim=-1)[2].unflatten(-1, (-1, cosine.shape[-1]))
    return parts[0], parts[1], value


def projects_heads(layers: Sequence[PackedLinear], cosine: Tensor, dtype: torch.dtype, batch: int) -> bool:
    """Whether project_heads takes these layers: those of Hopper, heads of 128, and of many samples one stream alone."""
    known = all(packed.backend == "sm90a" and packed.n % (3 * HEAD) == 0 for packed in layers)
    return known and cosine.shape[-1] == HEAD and dtype == torch.bfloat16 and (batch == 1 or len(layers) == 1)


def project_heads(
    acts: Sequence[QuantizedAct], layers: Sequence[PackedLinear], norms: list[Tensor], cosine: Tensor, sine: Tensor,
    eps: float, batch: int,
) -> Heads:  # fmt: skip
    """rotate_heads of `linear` of quantized tokens, in one kernel a stream: of the picture, or of text and picture.

    acts: tokens (B L) of the text, if any, and (B M) of the picture; layers: their projections to 3 H D outputs; the
    rest is as in rotate_heads. Only where `projects_heads`. The result is in bfloat16.
    """
    flat, blobs = [part for act in acts for part in act], [packed.blob for packed in layers]
    specs = [packed.spec.key for packed in layers]
    joint = _project_heads(flat, blobs, specs, norms, cosine, sine, eps, batch)
    query, key, value = joint.unflatten(-1, (3, -1, HEAD)).unbind(2)
    return query, key, value


# All blocks of a step ask for the same.
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def angles(cosine: Tensor, sine: Tensor) -> Tensor:
    """(T, D / 2, 2) float16: cosine and sine of each pair."""
    found = _kept.get(cosine)
    if found is None or found[0] is not sine:
        pairs = torch.stack((cosine[:, ::2], sine[:, ::2]), -1).to(torch.float16).contiguous()
        found = _kept[cosine] = (sine, pairs)
    return found[1]


def _launch_projection(
    acts: list[Tensor], blobs: list[Tensor], specs: list[str], norms: list[Tensor], cosine: Tensor, sine: Tensor,
    eps: float, batch: int,
) -> Tensor:  # fmt: skip
    parsed, turns = [parse(spec) for spec in specs], angles(cosine, sine)
    joint = torch.empty(batch, len(cosine), parsed[0].n, dtype=torch.bfloat16, device=cosine.device)
    weights, first = [weight.to(torch.bfloat16).contiguous() for weight in norms], 0
    for i, (blob, spec) in enumerate(zip(blobs, parsed, strict=True)):
        act, text = QuantizedAct(*acts[3 * i : 3 * i + 3]), len(blobs) == 2 and i == 0
        length = act.codes.shape[0] // batch
        norm_q, norm_k = weights[2:] if text else weights[:2]
        place = cuda.Heads(turns, norm_q, norm_k, eps, spec.n // (3 * HEAD), length, first)
        cuda.linear_heads_(joint[:, first : first + length], act, blob, spec, place)
        first += length
    return joint


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
    if not takes_kernels(qkv.device) or qkv.dtype != torch.bfloat16 or cosine.shape[-1] != HEAD:
        return _plain_heads(qkv, text, norms, cosine, sine, eps)
    (batch, length, width), words = qkv.shape, 0 if text is None else text.shape[1]
    heads, tokens = width // 3 // HEAD, length + words
    qkv, rows = qkv.contiguous(), None if text is None else text.contiguous()
    weights = [weight.to(torch.bfloat16).contiguous() for weight in (*norms, *norms)[:4]]
    made = [qkv.new_empty(batch, tokens, heads, HEAD) for _ in range(2 if text is None else 3)]
    read = (rows, qkv, *weights, angles(cosine, sine), *made)
    addresses = [0 if part is None else part.data_ptr() for part in read] + [0] * (3 - len(made))
    with torch.cuda.device(qkv.device):
        stream = torch.cuda.current_stream().cuda_stream
        check(kernels().rotate_heads_sm80(addresses, (batch, heads, tokens, words), eps, stream))
    return made


_library.impl("rotate_heads", _plain_heads, "CPU")
_library.impl("rotate_heads", _launch_heads, "CUDA")
_library.impl("project_heads", _launch_projection, "CUDA")


@torch.library.register_fake("nibble::rotate_heads", lib=_library)
def _(qkv: Tensor, text: Tensor | None, norms: list[Tensor], cosine: Tensor, sine: Tensor, eps: float) -> list[Tensor]:
    head = cosine.shape[-1]
    tokens = qkv.shape[1] + (0 if text is None else text.shape[1])
    shape = (qkv.shape[0], tokens, qkv.shape[2] // 3 // head, head)
    return [qkv.new_empty(shape) for _ in range(2 if text is None else 3)]


@torch.library.register_fake("nibble::project_heads", lib=_library)
def _(
    acts: list[Tensor], blobs: list[Tensor], specs: list[str], norms: list[Tensor], cosine: Tensor, sine: Tensor,
    eps: float, batch: int,
) -> Tensor:  # fmt: skip
    return cosine.new_empty((batch, len(cosine), parse(specs[0]).n), dtype=torch.bfloat16)
