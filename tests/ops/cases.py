"""The one table of cases that every backend answers to, and the random layers that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine import ops
from engine.ops import reference

__all__ = ["CASES", "DTYPES", "STRIDES", "Case", "allowed_error", "expected", "random_awq", "random_linear", "tokens"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


class Case(NamedTuple):
    """M tokens, N outputs (any number), K inputs (a multiple of 64), rank R (a multiple of 16)."""

    m: int
    n: int
    k: int
    rank: int


# Chosen for their edges: one token; a token more or less than the tiles of 4, 14 and 32; N below, at and above a panel
# of 16; one group; many groups; more tokens than a cache block holds.
CASES = (
    Case(1, 16, 64, 0),
    Case(1, 384, 384, 32),
    Case(2, 48, 128, 16),
    Case(3, 40, 192, 16),
    Case(5, 7, 12288, 16),
    Case(13, 33, 64, 0),
    Case(14, 32, 256, 32),
    Case(15, 17, 320, 48),
    Case(29, 1, 64, 16),
    Case(33, 80, 4096, 32),
    Case(37, 384, 384, 32),
    Case(64, 96, 1536, 16),
    Case(230, 24, 2240, 32),
)

# How x lies in memory: row stride and offset differ, or inputs are not side by side.
STRIDES = ("contiguous", "rows of a wider tensor", "odd offset", "transposed", "three dimensions")


def random_linear(
    case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 0, smooth: bool = True, bias: bool = True
) -> ops.CanonicalLinear:
    """A layer with weights of a plausible size; 16-bit tensors in `dtype` (bfloat16 for float32)."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    _, n, k, rank = case
    return ops.CanonicalLinear(
        codes=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw),
        wscales=(torch.rand(n, k // 64, generator=draw) * 0.01 + 0.001).to(half),
        smooth=(torch.rand(k, generator=draw) * 2 + 0.25).to(half) if smooth else None,
        lora_down=(torch.randn(rank, k, generator=draw) * k**-0.5).to(half) if rank else None,
        lora_up=(torch.randn(n, rank, generator=draw) * 0.1).to(half) if rank else None,
        bias=torch.randn(n, generator=draw).to(half) if bias else None,
    )


def random_awq(case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> ops.AwqWeight:
    """A weight-only layer; 16-bit tensors in `dtype` (bfloat16 for float32)."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    scales = (torch.rand(case.n, case.k // 64, generator=draw) * 0.01 + 0.001).to(half)
    codes = torch.randint(0, 256, (case.n, case.k // 2), dtype=torch.uint8, generator=draw)
    zeros = (scales.float() * -7.5 + torch.randn(scales.shape, generator=draw) * 0.001).to(half)
    return ops.AwqWeight(codes, scales, zeros, torch.randn(case.n, generator=draw).to(half))


def tokens(case: Case, dtype: torch.dtype, strides: str = "contiguous", seed: int = 1) -> Tensor:
    """x (M, K), or (2, M, K) for "three dimensions", with a few outliers, lying in memory as `strides` says."""
    draw = torch.Generator().manual_seed(seed)
    m, k = case.m, case.k
    values = torch.randn(2 * m if strides == "three dimensions" else m, k, generator=draw)
    values[:, 3] *= 20
    values = values.to(dtype)
    if strides == "rows of a wider tensor":
        return torch.full((m, k + 24), torch.nan, dtype=dtype)[:, 8 : 8 + k].copy_(values)
    if strides == "odd offset":
        return torch.full((m * k + 3,), torch.nan, dtype=dtype)[3:].view(m, k).copy_(values)
    if strides == "transposed":
        return values.T.contiguous().T
    return values.view(2, m, k) if strides == "three dimensions" else values


def expected(x: Tensor, weight: ops.CanonicalLinear, mode: str) -> tuple[reference.QuantizedAct, Tensor]:
    """The reference's codes and its y (M, N) in float64."""
    act = reference.quantize_act(x.reshape(-1, weight.k), weight.smooth, weight.lora_down, mode, torch.float64)
    return act, reference.linear(act, weight, torch.float64)


def allowed_error(act: reference.QuantizedAct, weight: ops.CanonicalLinear, y: Tensor, dtype: torch.dtype) -> Tensor:
    """How far y (M, N) in `dtype` may lie from the float64 result, element by element.

    Half a unit of the output type; for sums in fp32, 2^-20 of the sum of magnitudes of all terms; and where tokens are
    bfloat16, 2^-8 of the low-rank terms, whose factors a backend may round to 16 bits as the published kernels do.
    """
    scales = act.scales.double()
    runs = act.codes.double().abs().unflatten(1, (-1, 64))
    runs = runs * (scales[:, None, None] if scales.dim() == 1 else scales[..., None])
    terms = runs.flatten(1) @ ops.dequantize(weight, torch.float64).abs().T
    low_rank = torch.zeros_like(terms)
    if weight.lora_up is not None:
        low_rank = act.low_rank.double().abs() @ weight.lora_up.double().abs().T
    sums = terms + low_rank + (0 if weight.bias is None else weight.bias.double().abs())
    rounded = low_rank * 2.0**-8 if dtype == torch.bfloat16 else 0
    return y.abs() * EPSILON[dtype] + sums * 2.0**-20 + rounded + torch.finfo(dtype).smallest_normal


def check_a_bad_token(packed: ops.PackedLinear, x: Tensor, bad: float, mode: str = "int8") -> None:
    """A NaN or an infinity in token 7 of x (M, K) spoils row 7 of the result and no other."""
    clean = ops.svdq_linear(x, packed, mode)
    x[7, 5] = bad
    y = ops.svdq_linear(x, packed, mode)
    assert not y[7].isfinite().any()
    assert torch.equal(y[:7], clean[:7])
    assert torch.equal(y[8:], clean[8:])


def check_nvfp4_comes_back(linear: ops.CanonicalLinear, backend: str) -> None:
    """`backend` packs these NVFP4 weights itself, and every tensor of them unpacks as it was."""
    packed = ops.pack(linear, backend)
    assert (packed.backend, packed.kind) == (backend, "nvfp4")
    back = ops.unpack(packed)
    for name, value in vars(linear).items():
        other = getattr(back, name)
        assert (value is None) == (other is None), name
        assert value is None or torch.equal(value.contiguous().view(torch.uint8), other.view(torch.uint8)), name
