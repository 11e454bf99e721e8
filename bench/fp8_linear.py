"""A rival: FP8 linears as one would write them by hand, e4m3 with a scale for each token and each output row.

The arithmetic of torchao's dynamic rowwise FP8, on the same cuBLAS kernel, without its tensor subclasses: those did not
finish compiling in four minutes. Compiled, the quantization is one fused kernel before the product.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LARGEST = 448.0  # of e4m3


def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, K) -> e4m3 numbers of the same shape and float32 scales (rows, 1)."""
    wide = x.float()
    scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (wide / scale).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """In place of an nn.Linear: weights in e4m3, activations quantized on their way in."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = rowwise(linear.weight.detach())
        self.register_buffer("weight", weight)  # (N, K) float8_e4m3fn
        self.register_buffer("scale", scale.t().contiguous())  # (1, N) float32
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) bfloat16 -> (..., N) bfloat16."""
        flat, scale = rowwise(x.reshape(-1, x.shape[-1]))
        out = torch._scaled_mm(flat, self.weight.t(), scale_a=scale, scale_b=self.scale, bias=self.bias,
                               out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)  # fmt: skip
        return out.view(*x.shape[:-1], -1)


def is_large(module: nn.Module, name: str) -> bool:
    """Whether FP8 takes the layer: the linears of the transformer blocks, without norms' modulation."""
    return isinstance(module, nn.Linear) and "transformer_blocks" in name and "norm" not in name


def replace_linears(model: nn.Module) -> None:
    """Every large linear, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_large(module, name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Fp8Linear(module))
