"""The norm before a block's linears, taken along into their quantization where a kernel does that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from engine import ops
from engine.linear import SVDQuantLinear

__all__ = ["normed"]


def normed(x: Tensor, scale: Tensor, shift: Tensor, norm: nn.LayerNorm, *layers: nn.Module) -> list[Tensor]:
    """Each layer's output for norm(x) * (1 + scale) + shift; x (B, M, D), scale and shift (B, D)."""
    if all(isinstance(layer, SVDQuantLinear) and layer.backend == "sm90a" for layer in layers):
        quantized: Any = layers
        acts = ops.norm_quantize(x, scale, shift, norm.eps, [layer.packed for layer in quantized], quantized[0].mode)
        outs = [layer.multiply(act, x.dtype) for layer, act in zip(quantized, acts, strict=True)]
        return [out.view(*x.shape[:-1], -1) for out in outs]
    normed = norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    return [layer(normed) for layer in layers]
