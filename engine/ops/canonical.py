"""Quantized weights in their canonical form: plain row-major tensors, as they lie on disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import ArgumentError

__all__ = ["E2M1", "AwqWeight", "CanonicalLinear", "dequantize", "dequantize_awq", "join_nibbles", "split_nibbles"]

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
FLOATS = (*SIXTEEN_BIT, torch.float32)

# Value of each e2m1 code: bit 3 is the sign, then two exponent bits and one mantissa bit.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, eq=False)
class CanonicalLinear:
    """y = dequant(codes) @ (x / smooth) + lora_up @ (lora_down @ x) + bias, with W of shape (N, K).

    codes (N, K/2) uint8, low nibble = even k. int4: two's complement -8..7; nvfp4: index into E2M1.
    wscales (N, K/G): 16-bit for int4 (G = 64), float8_e4m3fn for nvfp4 (G = 16); their dtype tells the kind.
    smooth (K); lora_down (R, K) and lora_up (N, R) 16-bit, R a multiple of 16; bias (N).
    wtscale (1) and wcscales (N) multiply nvfp4 weights, as a whole and per row.
    Raises ArgumentError where shapes or dtypes disagree.
    """

    codes: Tensor
    wscales: Tensor
    smooth: Tensor | None = None
    lora_down: Tensor | None = None
    lora_up: Tensor | None = None
    bias: Tensor | None = None
    wtscale: Tensor | None = None
    wcscales: Tensor | None = None

    def __post_init__(self) -> None:
        _check_codes(self.codes)
        if self.kind == "int4":
            _expect("wscales", self.wscales, (self.n, self.k // self.group), SIXTEEN_BIT)
            if self.wtscale is not None or self.wcscales is not None:
                raise ArgumentError("wtscale, wcscales: expected None for int4 weights, got a tensor")
        else:
            _expect("wscales", self.wscales, (self.n, self.k // self.group), (torch.float8_e4m3fn,))
        if (self.lora_down is None) != (self.lora_up is None):
            raise ArgumentError("lora_down, lora_up: expected both or neither, got one")
        rank = self.rank
        if rank % 16:
            raise ArgumentError(f"lora_down: expected a rank that is a multiple of 16, got {rank}")
        if self.lora_down is not None:
            _expect("lora_down", self.lora_down, (rank, self.k), SIXTEEN_BIT)
            _expect("lora_up", self.lora_up, (self.n, rank), (self.lora_down.dtype,))
        _expect("smooth", self.smooth, (self.k,), FLOATS)
        _expect("bias", self.bias, (self.n,), FLOATS)
        _expect("wtscale", self.wtscale, (1,), FLOATS)
        _expect("wcscales", self.wcscales, (self.n,), FLOATS)

    @property
    def kind(self) -> str:
        """ "int4" or "nvfp4"."""
        return "nvfp4" if self.wscales.dtype == torch.float8_e4m3fn else "int4"

    @property
    def n(self) -> int:
        """Outputs."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.codes.shape[1] * 2

    @property
    def rank(self) -> int:
        """Size of the low-rank branch; 0 without one."""
        return 0 if self.lora_down is None else self.lora_down.shape[0]

    @property
    def group(self) -> int:
        """Inputs that share a weight scale."""
        return 16 if self.kind == "nvfp4" else 64


@dataclass(frozen=True, eq=False)
class AwqWeight:
    """y = (codes * scales + zeros) @ x + bias, 16-bit activations.

    codes (N, K/2) uint8, unsigned 0..15, low nibble = even k; scales, zeros (N, K/64) 16-bit; bias (N).
    Raises ArgumentError where shapes or dtypes disagree.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _check_codes(self.codes)
        _expect("scales", self.scales, (self.n, self.k // 64), SIXTEEN_BIT)
        _expect("zeros", self.zeros, (self.n, self.k // 64), (self.scales.dtype,))
        _expect("bias", self.bias, (self.n,), FLOATS)

    @property
    def n(self) -> int:
        """Outputs."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.codes.shape[1] * 2


def split_nibbles(codes: Tensor) -> Tensor:
    """(N, K/2) bytes -> (N, K) uint8 of 0..15, low nibble first."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


def join_nibbles(nibbles: Tensor) -> Tensor:
    """(N, K) integers, of which the low four bits count -> (N, K/2) bytes. The inverse of split_nibbles."""
    low_four = nibbles.to(torch.uint8) & 15
    return low_four[..., ::2] | (low_four[..., 1::2] << 4)


def dequantize(linear: CanonicalLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the residual weight (N, K): codes times every scale, without smoothing and without the low-rank branch."""
    nibbles = split_nibbles(linear.codes)
    if linear.kind == "int4":
        values = ((nibbles ^ 8).to(torch.int8) - 8).to(dtype)
    else:
        values = torch.tensor(E2M1, dtype=dtype, device=nibbles.device)[nibbles.long()]
    weight = values * linear.wscales.to(dtype).repeat_interleave(linear.group, dim=1)
    if linear.wtscale is not None:
        weight = weight * linear.wtscale.to(dtype)
    return weight if linear.wcscales is None else weight * linear.wcscales.to(dtype)[:, None]


def dequantize_awq(weight: AwqWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W (N, K) = codes * scales + zeros."""
    scales, zeros = (t.to(dtype).repeat_interleave(64, dim=1) for t in (weight.scales, weight.zeros))
    return split_nibbles(weight.codes).to(dtype) * scales + zeros


def _check_codes(codes: Tensor) -> None:
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ArgumentError(f"codes: expected uint8 of shape (N, K/2), got {codes.dtype} {tuple(codes.shape)}")
    if codes.shape[0] == 0 or codes.shape[1] == 0 or codes.shape[1] % 32:
        raise ArgumentError(f"codes: expected N >= 1 and K a multiple of 64, got N, K/2 = {tuple(codes.shape)}")


def _expect(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor is None or (tuple(tensor.shape) == shape and tensor.dtype in dtypes):
        return
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise ArgumentError(f"{name}: expected {wanted} of shape {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
