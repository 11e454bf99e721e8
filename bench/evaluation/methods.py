"""Ways to bring a zoo model to 4 bits, all on the same layers: this engine's own stages, and what others offer.

Methods of 4-bit weights and activations run on this engine's kernels from checkpoints made here, so that they differ in
the numbers in the file alone. Weight-only methods put the values their own quantizer gives back into BF16 layers, which
is what their kernels compute. A model that is a LoRA on another one wears it in 16 bits, in every method.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evaluation.machine import write_json
from engine import Engine, ops
from engine.errors import ArgumentError, BackendError
from engine.models import loading
from engine.models.catalogue import CATALOGUE, ModelSpec
from engine.models.families import family
from engine.models.plan import get_linear
from engine.quantize import Recipe, quantize_model
from engine.quantize.source import Weights, part_folder

__all__ = ["METHODS", "Method", "calibration_prompts", "claim", "open_checkpoint_engine", "open_engine"]

NF4_BLOCK, GROUP = 64, 64


@dataclasses.dataclass(frozen=True)
class Method:
    """One way: weights and activations in `bits`; what runs it (`by`); a `recipe` or a `rounding` of weights."""

    title: str
    bits: str
    by: str
    recipe: Recipe | None = None
    rounding: Callable[[Tensor], Tensor] | None = None
    calibrated: bool = False


def nf4(weight: Tensor) -> Tensor:
    """bitsandbytes' NF4, blocks of 64, and back."""
    functional = _library("bitsandbytes").functional
    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(codes, state)


def int4_weight_only(weight: Tensor) -> Tensor:
    """torchao's INT4 weight-only, groups of 64 with a zero point, and back."""
    quantization = _library("torchao.quantization")
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=quantization.PerGroup(GROUP),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantization.quantize_(layer, config)
    stored: Any = layer.weight
    return stored.dequantize()


_NEAREST = Recipe(rank=0, alphas=(), rounds=1, gptq=False, search=False, shift=False)
METHODS: dict[str, Method] = {
    "naive": Method("rounding to nearest", "W4A4", "this engine", _NEAREST),
    "svdquant": Method("SVDQuant without GPTQ", "W4A4", "this engine", Recipe(gptq=False), calibrated=True),
    "ours-w4a4": Method("this quantizer", "W4A4", "this engine", Recipe(), calibrated=True),
    "ours-w4a8": Method("this quantizer", "W4A8", "this engine", Recipe(), calibrated=True),
    "nf4": Method("bitsandbytes NF4", "W4A16", "its quantizer, BF16 layers", rounding=nf4),
    "int4wo": Method("torchao INT4 weight-only", "W4A16", "its quantizer, BF16 layers", rounding=int4_weight_only),
}


def open_engine(name: str, spec: ModelSpec, work: Path, samples: int, share: Engine | None) -> Engine:
    """An engine of `spec` by the method called `name`; checkpoints are made once and kept in `work`.

    Raises BackendError naming the package that a rival needs.
    """
    method = METHODS[name]
    if method.rounding:
        return _rounded(method.rounding, spec, share)
    path = _checkpoint(name.partition("-")[0], method, spec, work, samples)
    return open_checkpoint_engine(spec, path, "int4", method.bits.lower(), share)


def open_checkpoint_engine(
    spec: ModelSpec, path: Path, precision: str, activation: Any, share: Engine | None
) -> Engine:
    """An engine of `spec` that runs the checkpoint at `path`; encoders and VAE are those of `share`."""
    own = dataclasses.replace(spec, checkpoints={precision: str(path)})
    where = torch.device("cpu") if share is None else share.device
    with loading.LOADING:
        backend = ops.backends.select(where).name
        transformer = loading.quantized_transformer(own, precision, backend, activation, where)
        loading.add_lora(own, transformer)
        pipe = loading.pipeline(own, transformer, where, share.pipe if share else None)
    return Engine(own, precision, activation, backend, where, pipe)


def claim(work: Path, spec: ModelSpec, samples: int) -> None:
    """Tell `work` what makes its pictures of `spec`; raises ArgumentError when something else made them."""
    found = {"calibration_pictures": samples, "weights": Weights(part_folder(spec, "transformer")).fingerprint()}
    if spec.lora:
        found["lora"] = sha256(Path(spec.lora).read_bytes()).hexdigest()
    file = work / spec.name / "weights.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != found:
        raise ArgumentError(
            f"work: {work} holds pictures of other weights or samples of {spec.name}; name another folder"
        )
    write_json(file, found)


def calibration_prompts(samples: int) -> list[str]:
    """The first `samples` of the prompts that the small models are calibrated with."""
    text = (Path(__file__).resolve().parents[2] / "zoo" / "calibration.txt").read_text(encoding="utf-8")
    return text.splitlines()[:samples]


def _rounded(rounding: Callable[[Tensor], Tensor], spec: ModelSpec, share: Engine | None) -> Engine:
    """The 16-bit model with the weights of every layer that this engine quantizes taken through `rounding`."""
    where = torch.device("cpu") if share is None else share.device
    with loading.LOADING:
        transformer = loading.bf16_transformer(spec, where)
        leaves = family(spec.family).leaves
        leaves.prepare(transformer)
        for group in leaves.plan(transformer):
            for linear in (get_linear(transformer, part) for part in group.names):
                linear.weight.data.copy_(rounding(linear.weight.data))
        loading.add_lora(spec, transformer)
        pipe = loading.pipeline(spec, transformer, where, share.pipe if share else None)
    return Engine(spec, "bf16", "w16a16", "torch", where, pipe)


def _checkpoint(name: str, method: Method, spec: ModelSpec, work: Path, samples: int) -> Path:
    base = next(row for row in CATALOGUE.values() if row.source == spec.source and not (row.lora or row.runner))
    path = work / "checkpoints" / f"{base.name}-{name}"
    if path.is_dir():
        return path
    prompts = calibration_prompts(samples) if method.calibrated else []
    assert method.recipe is not None
    quantize_model(base, path, prompts=prompts, recipe=method.recipe, device="cpu", resume=True)
    return path


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise BackendError(f"{package} is needed to run its quantizer: pip install {package} ({error})") from error
