"""Small layers on a device beside the reference on the CPU: asked once before kernels are taken that nobody named.

The kernels of sm80 run on many cards and were tested on a few. A wrong result would be a bad picture without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine import ops
from engine.ops import reference
from engine.ops.canonical import AwqWeight, CanonicalLinear
from engine.ops.layout import PackedAwq, PackedLinear, pack, pack_awq

__all__ = ["failure"]

# Ragged tiles of tokens and outputs, more groups than a kernel has stages.
_M, _N, _K, _R = 70, 152, 384, 16


@torch.no_grad()
def failure(device: torch.device, backend: str) -> str:
    """Why the kernels of `backend` are not to be trusted on `device`; nothing where they gave what they should."""
    draw = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(_M, _K, generator=draw).bfloat16()
    try:
        wrong = [
            mode for mode in ops.backends.modes(backend) if not _multiplies(x, _linear(draw), mode, device, backend)
        ]
        if not _multiplies_awq(x[:5], _awq(draw), device, backend):
            wrong.append("weight-only")
    except RuntimeError as error:  # of a kernel that could not be launched, or of torch when the device gave up
        return f"its self-check could not run ({str(error).splitlines()[0]})"
    return f"its self-check gave wrong results ({', '.join(wrong)})" if wrong else ""


def _codes(draw: torch.Generator) -> Tensor:
    return torch.randint(0, 256, (_N, _K // 2), dtype=torch.uint8, device="cpu", generator=draw)


def _normal(*shape: int, draw: torch.Generator) -> Tensor:
    return torch.randn(*shape, device="cpu", generator=draw)


def _linear(draw: torch.Generator) -> CanonicalLinear:
    return CanonicalLinear(
        codes=_codes(draw),
        wscales=(_normal(_N, _K // 64, draw=draw).abs() * 0.01 + 0.001).bfloat16(),
        smooth=(_normal(_K, draw=draw).abs() + 0.25).bfloat16(),
        lora_down=(_normal(_R, _K, draw=draw) * _K**-0.5).bfloat16(),
        lora_up=(_normal(_N, _R, draw=draw) * 0.1).bfloat16(),
        bias=_normal(_N, draw=draw).bfloat16(),
    )


def _awq(draw: torch.Generator) -> AwqWeight:
    scales = (_normal(_N, _K // 64, draw=draw).abs() * 0.01 + 0.001).bfloat16()
    return AwqWeight(_codes(draw), scales, (scales.float() * -7.5).bfloat16(), _normal(_N, draw=draw).bfloat16())


def _multiplies(x: Tensor, weight: CanonicalLinear, mode: str, device: torch.device, backend: str) -> bool:
    packed = pack(weight, backend)
    there = PackedLinear(packed.blob.to(device), packed.spec, packed.dtype)
    act = reference.quantize_act(x, weight.smooth, weight.lora_down, mode)
    return _close(ops.svdq_linear(x.to(device), there, mode), reference.linear(act, weight))


def _multiplies_awq(x: Tensor, weight: AwqWeight, device: torch.device, backend: str) -> bool:
    packed = pack_awq(weight, backend)
    there = PackedAwq(packed.blob.to(device), packed.spec, packed.dtype)
    return _close(ops.awq_linear(x.to(device), there), reference.awq_linear(x, weight))


def _close(y: Tensor, wanted: Tensor) -> bool:
    """To some bits more than a rounding to bfloat16 costs; a value from elsewhere would have to be lucky."""
    return bool(((y.cpu().float() - wanted).abs() <= 2.0**-6 * (wanted.abs() + wanted.std())).all())
