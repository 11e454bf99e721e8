"""SANA's depthwise 3x3 convolution as nine shifted products.

Compiled, that is one kernel forward and few backward; the libraries' own backward pass of a depthwise convolution in 16
bits can be many times slower, depending on device and version. So it is timed, and replaced where it is slow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.train.log import Log

_REPEATS, _PASSES = 5, 12


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
    """Whether the library's convolution is slow on this GPU for (batch, C, size, size) in bfloat16, both ways.

    Slow is more than `_PASSES` times what reading and writing the picture once takes; the shifted form, compiled,
    needs about half as much. Timing that form too would cost more seconds of compiling than it could save.
    """
    layer = copy.deepcopy(convolution)
    device = layer.weight.device
    shape = (batch, layer.weight.shape[0], size, size)
    x = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()

    def both_ways() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            layer(x).backward(x.detach())

    library, once = _milliseconds(both_ways), _milliseconds(lambda: x.detach() + 1)
    log("flow", depthwise_ms=library, one_pass_ms=once, shifted=library > _PASSES * once)
    return library > _PASSES * once


def _milliseconds(work: Callable[[], object]) -> float:
    for _ in range(2):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        work()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / _REPEATS, 3)
