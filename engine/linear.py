"""The two quantized layers that take the place of nn.Linear inside a diffusers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import ops
from engine.errors import ArgumentError

__all__ = ["ACTIVATIONS", "AWQLinear", "Activation", "SVDQuantLinear", "fold_gelu_shift", "resolve_activation"]

Activation = Literal["w4a4", "w4a8"]
ACTIVATIONS: tuple[Activation, ...] = ("w4a4", "w4a8")


def resolve_activation(activation: str, device: torch.device) -> Activation:
    """Turn "auto" into 8-bit activations, which every device has kernels for, or 4-bit ones where sm120a was asked for.

    Raises ArgumentError for an unknown name.
    """
    if activation == "auto":
        return "w4a4" if ops.backends.select(device).name == "sm120a" else "w4a8"
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation: expected auto, {' or '.join(ACTIVATIONS)}, got {activation!r}")
    return activation  # pyright: ignore[reportReturnType]


class SVDQuantLinear(nn.Module):
    """y = dequant(codes) @ quantize(x / smooth) + lora_up @ (lora_down @ x) + bias  (SVDQuant, arXiv 2411.05007).

    `linear` holds N rows over K inputs with a rank-R branch in the canonical layout; it is re-tiled for `backend`.
    `unsigned_input` says that x is a GELU output, which W4A4 shifts and quantizes to 0..15. Set `gelu` where the layer
    shall apply GELU itself: a kernel can do that at no cost.
    """

    def __init__(
        self,
        linear: ops.CanonicalLinear,
        *,
        backend: str,
        activation: Activation,
        dtype: torch.dtype,
        unsigned_input: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.k, linear.n
        self.activation = activation
        self.dtype = dtype
        self.unsigned_input = unsigned_input
        self.kind = linear.kind
        self.mode, self._wanted = self._mode_on(backend)
        if self.mode == "uint4":
            linear = fold_gelu_shift(linear)
        self.own_rank = linear.rank
        self.branch_scale: Tensor | None = None
        self.bias_delta: Tensor | None = None
        # The smooth factor that was divided out of the rows of V instead of here (engine.checkpoint.folding).
        self.folded_smooth: Tensor | None = None
        self.gelu = False
        self.wide = False
        self._hold(ops.pack(linear, self._wanted, dtype))

    def _mode_on(self, backend: str) -> tuple[str, str]:
        """The activation mode, and the backend that offers it: `backend`, or another where it does not.

        Hopper's own kernels know 8-bit tokens alone; Ampere's, which run there too, have 4-bit ones. NVFP4 weights in
        W4A4 have NVFP4 tokens, GELU outputs too, as published; INT4 weights on sm120a take Ampere's kernels.
        """
        if self.kind == "nvfp4" and self.activation == "w4a4":
            return "nvfp4", (backend if backend == "sm120a" else "reference")
        if backend == "sm120a":
            backend = "reference" if self.kind == "nvfp4" else "sm80"
        modes = ops.backends.modes(backend)
        if self.activation == "w4a8":
            return ("int8" if "int8" in modes else "fp8"), backend
        mode = "uint4" if self.unsigned_input else "int4"
        return mode, (backend if mode in modes else "sm80" if backend == "sm90a" else "reference")

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x; with `gelu`, GELU of that in its tanh form."""
        if self.branch_scale is None and self.bias_delta is None:
            return ops.svdq_linear(x, self.packed, self.mode, self.gelu)
        return self.multiply(ops.quantize_act(x, self.packed, self.mode, pairs=True), x.dtype).view(*x.shape[:-1], -1)

    def multiply(self, act: ops.QuantizedAct, dtype: torch.dtype) -> Tensor:
        """What `forward` does after quantizing: tokens (M, K) of ops.quantize_act or norm_quantize -> y (M, N)."""
        if self.branch_scale is not None:
            act = act._replace(low_rank=(act.low_rank * self.branch_scale).to(act.low_rank.dtype))
        if self.bias_delta is None:
            return ops.linear(act, self.packed, dtype, self.gelu)
        y = ops.linear(act, self.packed, dtype) + self.bias_delta
        return F.gelu(y, approximate="tanh") if self.gelu else y

    def extend_branch(self, down: Tensor | None, up: Tensor | None, scale: Tensor | None) -> None:
        """Put more ranks (LoRAs) beside the layer's own: down (R', K), up (N, R'), R' a multiple of 16.

        `scale` (own rank + R') float32 multiplies the low-rank activations; changing it in place takes effect at the
        next call. Three Nones take the ranks away again, which restores the layer bit for bit.
        """
        linear, own = ops.unpack(self.packed), self.own_rank
        factors: dict[str, Tensor | None] = {"lora_down": None, "lora_up": None}
        if own:
            factors = {"lora_down": linear.lora_down[:own], "lora_up": linear.lora_up[:, :own].contiguous()}  # pyright: ignore[reportOptionalSubscript]
        if down is not None and up is not None:
            like = factors["lora_down"] if own else linear.wscales.new_empty(0, dtype=self.dtype)
            new_down, new_up = (value.to(like.device, like.dtype) for value in (down, up))  # pyright: ignore[reportOptionalMemberAccess]
            factors = {
                "lora_down": torch.cat((factors["lora_down"], new_down)) if own else new_down,  # pyright: ignore[reportArgumentType]
                "lora_up": torch.cat((factors["lora_up"], new_up), 1) if own else new_up,  # pyright: ignore[reportArgumentType]
            }
        # Not the present backend: with other factors the layer may have to leave the wanted one, or come back to it.
        self._hold(ops.pack(replace(linear, **factors), self._wanted, self.packed.dtype))
        self.branch_scale = scale

    @property
    def backend(self) -> str:
        """Name of the backend whose tiles this layer holds."""
        return self.packed.backend

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        packed = self.packed
        return f"{self.in_features}, {self.out_features}, rank={packed.rank}, {self.mode}, backend={packed.backend}"

    def _hold(self, packed: ops.PackedLinear) -> None:
        # Buffers make the bytes countable and let .to() find them; they are never saved, disk holds the canonical form.
        self.packed = packed
        for name, tensor in packed.tensors().items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)
        self.register_buffer("packed_wide", ops.keep_wide(packed) if self.wide else None, persistent=False)

    def keep_wide(self, wide: bool) -> None:
        """Keep the weights in 8 bits too, where products multiply those (ops.keep_wide), or no more."""
        if wide == self.wide:
            return
        if not wide:
            ops.drop_wide(self.packed)
        self.wide = wide
        self._hold(self.packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVDQuantLinear:
        # Tiles belong to one device, and 16-bit scales must not be cast: only a change of device means anything here.
        probe = next(iter(self.packed.tensors().values()))
        device = fn(torch.empty(0, device=probe.device)).device
        if device != probe.device:
            canonical = ops.unpack(self.packed)
            moved = {name: value.to(device) for name, value in vars(canonical).items() if isinstance(value, Tensor)}
            self.mode, self._wanted = self._mode_on(ops.backends.select(device).name)
            self._hold(ops.pack(replace(canonical, **moved), self._wanted, self.dtype))
            self.branch_scale = None if self.branch_scale is None else self.branch_scale.to(device)
            self.bias_delta = None if self.bias_delta is None else self.bias_delta.to(device)
        return self


class AWQLinear(nn.Module):
    """y = (codes * scales + zeros) @ x + bias: 4-bit weights, 16-bit activations, group 64 (AWQ, W4A16)."""

    def __init__(self, weight: ops.AwqWeight, *, backend: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.k, weight.n
        self.dtype = dtype
        self.branch: tuple[Tensor, Tensor, Tensor] | None = None
        self.bias_delta: Tensor | None = None
        self._hold(ops.pack_awq(weight, backend, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x."""
        y = ops.awq_linear(x, self.packed)
        if self.branch is not None:
            down, up, scale = self.branch
            y = y + ((x.float() @ down.T) * scale @ up.T).to(y.dtype)
        return y if self.bias_delta is None else y + self.bias_delta

    def extend_branch(self, down: Tensor | None, up: Tensor | None, scale: Tensor | None) -> None:
        """Add a low-rank branch (LoRAs) down (R, K), up (N, R) with `scale` (R) float32; three Nones remove it."""
        if down is None or up is None or scale is None:
            self.branch = None
        else:
            self.branch = (down.to(scale.device, torch.float32), up.to(scale.device, torch.float32), scale)

    @property
    def backend(self) -> str:
        """Name of the backend whose tiles this layer holds."""
        return self.packed.backend

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features}, {self.out_features}, w4a16, backend={self.packed.backend}"

    def _hold(self, packed: ops.PackedAwq) -> None:
        self.packed = packed
        for name, tensor in packed.tensors().items():
            self.register_buffer(f"packed_{name}", tensor, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AWQLinear:
        probe = next(iter(self.packed.tensors().values()))
        device = fn(torch.empty(0, device=probe.device)).device
        if device != probe.device:
            canonical = ops.unpack_awq(self.packed)
            moved = {name: value.to(device) for name, value in vars(canonical).items() if isinstance(value, Tensor)}
            self._hold(ops.pack_awq(replace(canonical, **moved), ops.backends.select(device).name, self.dtype))
            if self.branch is not None:
                down, up, scale = self.branch
                self.branch = (down.to(device), up.to(device), scale.to(device))
            self.bias_delta = None if self.bias_delta is None else self.bias_delta.to(device)
        return self


def fold_gelu_shift(linear: ops.CanonicalLinear) -> ops.CanonicalLinear:
    """Return `linear` with a bias that undoes the shift which W4A4 adds to GELU outputs before it quantizes them.

    The shift of 11/64 reaches the residual branch alone, so it adds shift * sum_k dequant[n, k] / smooth[k] to row n.
    """
    residual = ops.dequantize(linear).double()
    if linear.smooth is not None:
        residual = residual / linear.smooth.double()
    excess = ops.GELU_SHIFT * residual.sum(dim=1)
    bias = excess.new_zeros(linear.n) if linear.bias is None else linear.bias.double()
    return replace(linear, bias=(bias - excess).to(linear.wscales.dtype if linear.bias is None else linear.bias.dtype))
