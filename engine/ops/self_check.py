"""Small layers on a device beside the reference on the CPU: asked once before kernels are taken that nobody named.

The kernels of sm80 run on many cards and were tested on a few. A wrong result would be a bad picture without a word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    try:
        with torch.device("cpu"):
            x = _normal(_M, _K, draw=draw).bfloat16()
            modes = ops.backends.modes(backend)
            wrong = [mode for mode in modes if not _serves(x, _linear(draw), mode, device, backend)]
            if not _multiplies_awq(x[:5], _awq(draw), device, backend):
                wrong.append("weight-only")
    except torch.OutOfMemoryError:  # says nothing of the kernels
        raise
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


def _serves(x: Tensor, weight: CanonicalLinear, mode: str, device: torch.device, backend: str) -> bool:
    """Whether a layer multiplies, applies GELU, and adds what it gives to a stream, each in its own kernel."""
    packed = pack(weight, backend)
    there, given = PackedLinear(packed.blob.to(device), packed.spec, packed.dtype), x.to(device)
    wanted = reference.linear(reference.quantize_act(x, weight.smooth, weight.lora_down, mode), weight)
    stream, gate = wanted.flip(0).bfloat16()[None], wanted[:1].bfloat16()
    added = stream.to(device, copy=True)
    ops.add_linear_(added, gate.to(device), given[None], there, mode)
    return (
        _close(ops.svdq_linear(given, there, mode), wanted)
        and _close(ops.svdq_linear(given, there, mode, gelu=True), F.gelu(wanted, approximate="tanh"))
        and _close(added[0], stream[0].float() + gate.float() * wanted)
    )


def _multiplies_awq(x: Tensor, weight: AwqWeight, device: torch.device, backend: str) -> bool:
    packed = pack_awq(weight, backend)
    there = PackedAwq(packed.blob.to(device), packed.spec, packed.dtype)
    wanted, x = reference.awq_linear(x, weight), x.to(device)
    made = (ops.awq_linear(x, there), *ops.awq_linears(x, [there, there]))  # each layer alone, and many in one launch
    return all(_close(y, wanted) for y in made)


def _close(y: Tensor, wanted: Tensor) -> bool:
    """To some bits more than a rounding to bfloat16 costs; a value from elsewhere would have to be lucky."""
    return bool(((y.cpu().float() - wanted).abs() <= 2.0**-6 * (wanted.abs() + wanted.std())).all())
