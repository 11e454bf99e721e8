"""SANA's depthwise 3x3 convolution as nine shifted products.

Compiled, that is one kernel forward and few backward; the libraries' own backward pass of a depthwise convolution in 16
bits can be many times slower, depending on device and version. So both are timed and the quicker one is used.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.train.log import Log

_REPEATS = 5


class ShiftedConv(nn.Conv2d):
    """Replaces a depthwise Conv2d (3x3, padding 1) by assignment to `__class__`; eager calls stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return shifted(x, self.weight, self.bias) if torch.compiler.is_compiling() else super().forward(x)


def shifted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (C, 1, 3, 3), bias (C) -> (B, C, H, W) in x's type; sums are float32."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (1, 1, 1, 1)).float()
    out = bias.float().view(1, -1, 1, 1)
    for row in range(3):
        for column in range(3):
            out = out + padded[:, :, row : row + height, column : column + width] * weight[
                :, :, row, column
            ].float().view(1, -1, 1, 1)
    return out.to(x.dtype)


def shifts_win(convolution: nn.Conv2d, batch: int, size: int, log: Log) -> bool:
    """Whether the shifted form, compiled, is quicker on this GPU for (batch, C, size, size) in bfloat16, both ways."""
    try:
        took = {
            "library": _time(nn.Conv2d, convolution, batch, size),
            "shifted": _time(ShiftedConv, convolution, batch, size),
        }
    except Exception as error:  # a compiler that fails here only costs speed
        log("flow", depthwise="library", reason=f"{type(error).__name__}: {error}"[:200])
        return False
    log("flow", depthwise_library_ms=took["library"], depthwise_shifted_ms=took["shifted"])
    return took["shifted"] < took["library"]


def _time(kind: type[nn.Conv2d], convolution: nn.Conv2d, batch: int, size: int) -> float:
    layer = copy.deepcopy(convolution)
    layer.__class__ = kind
    device, channels = layer.weight.device, layer.weight.shape[0]
    shape = (batch, channels, size, size)
    # In the block the channels come last in memory.
    x = (
        torch.randn(shape, device=device, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
    )
    run = torch.compile(lambda x: layer(F.silu(x)), dynamic=False)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(2 + _REPEATS):
        if repeat == 2:
            start.record()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out = run(x)
        out.sum().backward()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / _REPEATS, 3)
