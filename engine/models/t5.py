"""The T5 text encoder with 4-bit weights: activations stay 16-bit, linears are replaced where the file has codes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import ops
from engine.checkpoint import t5 as layout
from engine.checkpoint.files import check_keys
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import RECORDS, read_quantization
from engine.checkpoint.source import Source
from engine.errors import CheckpointError
from engine.linear import AWQLinear
from engine.models.plan import get_linear, replace_module

__all__ = ["load_t5"]

_TIED = ("shared.weight", "encoder.embed_tokens.weight")


def load_t5(path: str | Path, *, backend: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Build a transformers T5EncoderModel from a published or canonical 4-bit T5 checkpoint.

    Raises CheckpointError when the file is damaged, of another model, or its keys or shapes differ.
    """
    from transformers import T5Config, T5EncoderModel

    with closing(open_checkpoint(path, device)) as files:
        details = read_quantization(files)
        if details.model_class != layout.MODEL_CLASS:
            raise CheckpointError(f"{path}: made for {details.model_class}, expected {layout.MODEL_CLASS}")
        try:
            with torch.device("meta"):
                model = T5EncoderModel(T5Config(**details.config))
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"{path}: no {layout.MODEL_CLASS} can be made from its model config ({error})"
            ) from error
        linears = sorted(name.removesuffix(".codes") for name in files if name.endswith(".codes"))
        _check(path, model, files, linears)
        for name in linears:
            layer = AWQLinear(_read(files, name), backend=backend, dtype=dtype)
            # T5's feed-forward asks `wo.weight` for a dtype to cast to when there is one.
            layer.weight = None  # pyright: ignore[reportArgumentType]
            replace_module(model, name, layer)
        _fill(model, files, dtype)
    return model.eval().requires_grad_(False)


def _check(path: str | Path, model: Any, files: Source, linears: list[str]) -> None:
    expected = set(model.state_dict()) - {f"{name}.weight" for name in linears}
    expected |= {f"{name}.{part}" for name in linears for part in ("codes", "scales", "zeros")}
    found = {name for name in files if not name.startswith(RECORDS)}
    if found & set(_TIED):
        # One embedding under two names; a file may hold either or both.
        found |= set(_TIED)
    check_keys(path, found, expected)
    for name in linears:
        linear = get_linear(model, name)
        shape = (linear.out_features, linear.in_features // 2)
        if files.shape(f"{name}.codes") != shape:
            raise CheckpointError(f"{path}: {name}.codes has shape {files.shape(f'{name}.codes')}, expected {shape}")


def _read(files: Source, name: str) -> ops.AwqWeight:
    """Groups of 128 become pairs of groups of 64 with equal scales: the same weight, bit for bit."""
    scales, zeros = (
        files[f"{name}.{part}"].repeat_interleave(layout.GROUP // 64, dim=1) for part in ("scales", "zeros")
    )
    weight = ops.AwqWeight(files[f"{name}.codes"], scales, zeros)
    return replace(weight, zeros=weight.zeros.to(weight.scales.dtype))


def _fill(model: Any, files: Source, dtype: torch.dtype) -> None:
    rest = {}
    for name, parameter in model.state_dict().items():
        if not parameter.is_meta:
            continue
        stored = name if name in files else next((tied for tied in _TIED if name in _TIED and tied in files), name)
        value = files[stored]
        if tuple(value.shape) != tuple(parameter.shape):
            raise CheckpointError(
                f"{files.path}: {stored} has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}"
            )
        rest[name] = value.to(dtype)
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
