"""Models and precisions to compare, by name: this engine's own and what others offer.

bf16                 16-bit, as diffusers runs it          int4, nvfp4      the model's 4-bit checkpoint
bf16+compiled        the same through torch.compile        int4@w4a4        with 4-bit activations
mine=DIR@w4a8        another 4-bit checkpoint of the model, under a label
nf4                  bitsandbytes NF4, W4A16               int4wo           torchao INT4 weight-only, group 64
fp8                  torchao FP8, a scale a row
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine import ArgumentError, BackendError, Engine
from engine.memory import module_bytes
from engine.models import loading
from engine.models.catalogue import ModelSpec

__all__ = ["RIVALS", "Variant", "check", "load", "parse"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One thing to measure. `kind` is a precision or a rival's name, `checkpoint` a path that replaces the model's."""

    label: str
    kind: str
    activation: str = "auto"
    compiled: bool = False
    checkpoint: str | None = None


def parse(text: str) -> Variant:
    """Read one name as the module's table has it; raises ArgumentError when a part is not understood."""
    label, equals, rest = text.rpartition("=")
    rest, _, activation = rest.partition("@")
    rest, _, how = rest.partition("+")
    if how not in ("", "compiled") or activation not in ("", "w4a4", "w4a8") or not rest:
        raise ArgumentError(
            f"precision: expected NAME, NAME@w4a4, NAME@w4a8, NAME+compiled or LABEL=CHECKPOINT, got {text!r}"
        )
    if equals and not re.fullmatch(r"[\w.-]+", label):
        raise ArgumentError(f"precision: expected a label of letters, digits, '.', '_' and '-', got {label!r}")
    if equals and not Path(rest).exists():
        raise ArgumentError(f"precision: {label}={rest}: no such file or folder")
    if equals:
        return Variant(label, _kind(Path(rest)), activation or "auto", how == "compiled", rest)
    return Variant(text, rest, activation or "auto", how == "compiled")


def check(variant: Variant, spec: ModelSpec) -> None:
    """Raise ArgumentError or BackendError where `variant` cannot be loaded: before hours of work, not after."""
    if variant.kind in RIVALS:
        _library("bitsandbytes" if variant.kind == "nf4" else "torchao")
    elif variant.checkpoint is None and variant.kind not in spec.precisions:
        known = ", ".join((*spec.precisions, *RIVALS))
        raise ArgumentError(f"precision: expected one of {known} for {spec.name}, got {variant.kind!r}")


def load(variant: Variant, spec: ModelSpec, device: str, share: Engine | None = None) -> Engine:
    """An engine that runs `variant`; encoders and VAE come from `share`, and 16-bit weights too where both have them.

    Raises what Engine.load raises, and BackendError naming the package that a rival needs.
    """
    if variant.checkpoint:
        # A shared engine must be of the same row, so the row is changed after sharing is settled.
        own = dataclasses.replace(spec, checkpoints={**spec.checkpoints, variant.kind: variant.checkpoint})
        engine = _quantized(variant, own, device, share)
    elif variant.kind in RIVALS:
        engine = Engine.load(spec, "bf16", device=device, share=share)
        RIVALS[variant.kind](engine.pipe.transformer, engine.device)
        engine.precision, engine.activation, engine.backend = variant.kind, "", RIVALS[variant.kind].__name__
    elif variant.kind == "bf16" and share is not None and share.precision == "bf16":
        engine = _another(share)
    else:
        engine = Engine.load(spec, variant.kind, device=device, activation=variant.activation, share=share)
    engine.weight_bytes = module_bytes(engine.pipe.transformer)
    if variant.compiled:
        engine.pipe.transformer.compile_repeated_blocks()
    return engine


def _quantized(variant: Variant, spec: ModelSpec, device: str, share: Engine | None) -> Engine:
    if share is None:
        return Engine.load(spec, variant.kind, device=device, activation=variant.activation)
    from engine import ops
    from engine.linear import resolve_activation

    where = share.device
    backend, activation = ops.backends.select(where).name, resolve_activation(variant.activation, where)
    transformer = loading.quantized_transformer(spec, variant.kind, backend, activation, where)
    pipe = loading.pipeline(spec, transformer, where, share.pipe)
    return Engine(spec, variant.kind, activation, backend, where, pipe)


def _another(first: Engine) -> Engine:
    """A second 16-bit engine on the same weights: compiling one leaves the other as it is."""
    model = first.pipe.transformer
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    transformer = copy.deepcopy(model, shared)
    pipe = loading.pipeline(first.spec, transformer, first.device, first.pipe)
    return Engine(first.spec, "bf16", first.activation, first.backend, first.device, pipe)


def _kind(checkpoint: Path) -> str:
    from engine.checkpoint.layouts import open_checkpoint
    from engine.checkpoint.quantization import read_quantization

    files = open_checkpoint(checkpoint)
    try:
        return "nvfp4" if read_quantization(files).group_size == 16 else "int4"
    finally:
        files.close()


def _block_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linears of the transformer's blocks, nearly all of its weights: what every method here quantizes."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n]


def bitsandbytes(model: nn.Module, device: torch.device) -> None:
    """NF4 with 16-bit activations, in place."""
    library = _library("bitsandbytes")
    from engine.models.plan import replace_module

    for name, linear in _block_linears(model):
        new = library.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=linear.weight.dtype,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = library.nn.Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
        new.bias = linear.bias
        replace_module(model, name, new.to(device))


def torchao(model: nn.Module, device: torch.device) -> None:
    """INT4 weight-only in groups of 64, in place."""
    quantization = _library("torchao").quantization
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(64))
    quantization.quantize_(model, config, filter_fn=_in_a_block)


def torchao_fp8(model: nn.Module, device: torch.device) -> None:
    """FP8 with a scale a row for weights and activations, in place."""
    quantization = _library("torchao").quantization
    config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    quantization.quantize_(model, config, filter_fn=_in_a_block)


RIVALS: dict[str, Callable[[nn.Module, torch.device], None]] = {
    "nf4": bitsandbytes,
    "int4wo": torchao,
    "fp8": torchao_fp8,
}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{name} is needed to run its quantization: pip install {name} ({error})") from error


def _in_a_block(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "transformer_blocks" in name
