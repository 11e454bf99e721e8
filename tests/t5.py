"""A T5 encoder in four bits, weight-only, for tests that need a file of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.models.install import Quantization

GROUP = 128


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (N, K/2), scales and zeros (N, K/128) of plain rounding between each group's least and largest value."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(2), groups.amax(2)
    scales, zeros = ((high - low) / 15).bfloat16(), low.bfloat16()
    codes = ((groups - zeros[..., None].float()) / scales[..., None].float()).round().clamp(0, 15).to(torch.uint8)
    codes = codes.flatten(1)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales, zeros


def four_bit_t5(encoder: Any, path: Path) -> Path:
    """Write `encoder` to `path` with the linears of its blocks in four bits; returns the path."""
    tensors = {}
    for name, value in encoder.state_dict().items():
        module = name.removesuffix(".weight")
        if ("SelfAttention." in name or "DenseReluDense" in name) and "bias" not in name:
            codes, scales, zeros = rounded(value)
            tensors |= {f"{module}.codes": codes, f"{module}.scales": scales, f"{module}.zeros": zeros}
        elif name != "encoder.embed_tokens.weight":
            tensors[name] = value.bfloat16()
    details = Quantization("T5EncoderModel", encoder.config.to_diff_dict(), "awq-int4", GROUP, 0)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=details.metadata())
    return path
