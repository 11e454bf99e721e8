"""Quantize a whole model, group by group, into a canonical checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.files import write_shards
from engine.errors import ArgumentError
from engine.generate import Engine
from engine.models.families import family
from engine.models.install import Quantization, is_kept
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.calibrate import collect
from engine.quantize.layer import Inputs, Recipe, quantize_group, quantize_weight_only

__all__ = ["LayerError", "quantize_model"]

Progress = Callable[[str, int, int], None]
# Hosts of public repositories refuse larger files more often than not; readers join shards anyway.
MAX_SHARD_BYTES = 14 * 2**20


@dataclass(frozen=True)
class LayerError:
    """Relative output error of one group on the calibration rows."""

    name: str
    kind: str
    error: float


@torch.inference_mode()
def quantize_model(
    model: str,
    out: str | Path,
    *,
    prompts: Sequence[str] = (),
    recipe: Recipe | None = None,
    keep: Sequence[str] = (),
    device: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> list[LayerError]:
    """Quantize the transformer of `model` by `recipe` and write a canonical checkpoint folder to `out`.

    `prompts` are run through the model to see real inputs; without any, every input channel counts alike. `keep`
    holds name patterns (fnmatch) of linears that stay in 16 bits. Returns the error of each group.
    Raises ArgumentError when a pattern matches nothing.
    """
    recipe = recipe or Recipe()
    tell = progress or (lambda *_: None)
    engine = Engine.load(model, "bf16", device=device)
    leaves = family(engine.spec.family).leaves
    transformer = leaves.prepare(engine.pipe.transformer)
    groups = _without_kept(leaves.plan(transformer), keep)
    inputs = _inputs(engine, transformer, groups, prompts, tell)
    tensors = {name: value.cpu() for name, value in transformer.state_dict().items()}
    report = []
    for done, group in enumerate(groups, start=1):
        # Without data every group's inputs are a matrix of K x K: one at a time, or they outgrow the model.
        seen = inputs.get(group) or _unknown(transformer, group, engine.device)
        report.append(_quantize(transformer, group, seen, recipe, tensors))
        tell("quantizing", done, len(groups))
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    group_size = 64 if recipe.precision == "int4" else 16
    details = Quantization(leaves.MODEL_CLASS, config, recipe.precision, group_size, recipe.rank, tuple(keep))
    write_shards(out, tensors, details.metadata(), max_shard_bytes)
    return report


def _without_kept(groups: list[LinearGroup], keep: Sequence[str]) -> list[LinearGroup]:
    for pattern in keep:
        if not any(is_kept(group, [pattern]) for group in groups):
            raise ArgumentError(f"keep: the pattern {pattern!r} matches no linear of the model")
    return [group for group in groups if not is_kept(group, keep)]


def _inputs(
    engine: Engine, transformer: Any, groups: list[LinearGroup], prompts: Sequence[str], tell: Progress
) -> dict[LinearGroup, Inputs]:
    if prompts:
        return collect(engine, transformer, groups, prompts, lambda done: tell("calibrating", done, len(prompts)))
    return {}


def _unknown(transformer: Any, group: LinearGroup, device: torch.device) -> Inputs:
    return Inputs.unknown(get_linear(transformer, group.names[0]).in_features, device)


def _quantize(
    transformer: Any, group: LinearGroup, inputs: Inputs, recipe: Recipe, tensors: dict[str, Tensor]
) -> LayerError:
    linears = [get_linear(transformer, name) for name in group.names]
    weight = torch.cat([linear.weight for linear in linears]).float()
    if group.kind == "awq":
        value, error = quantize_weight_only(weight, inputs, recipe)
        parts: dict[str, Tensor | None] = {"codes": value.codes, "scales": value.scales, "zeros": value.zeros}
        shared: dict[str, Tensor | None] = {}
    else:
        done = quantize_group(weight, inputs, recipe, unsigned=group.unsigned)
        linear, error, k = done.linear, done.error, weight.shape[1]
        groups = -(-k // linear.group)  # files hold the inputs that exist, in whole groups
        parts = {"codes": linear.codes[:, : k // 2], "wscales": linear.wscales[:, :groups], "lora_up": linear.lora_up}
        shared = {"smooth": linear.smooth, "lora_down": linear.lora_down}
        shared = {part: value if value is None else value[..., :k] for part, value in shared.items()}
        shared["wtscale"] = linear.wtscale
    _write_rows(group, [linear.out_features for linear in linears], parts, shared, tensors)
    return LayerError(group.title, group.kind, error)


def _write_rows(
    group: LinearGroup,
    rows: list[int],
    parts: dict[str, Tensor | None],
    shared: dict[str, Tensor | None],
    tensors: dict[str, Tensor],
) -> None:
    """Give each linear of the group its own rows and a copy of what they share; biases stay as they are."""
    split = {part: value.split(rows) for part, value in parts.items() if value is not None}
    for index, name in enumerate(group.names):
        del tensors[f"{name}.weight"]
        for part, pieces in split.items():
            tensors[f"{name}.{part}"] = pieces[index].clone().cpu()
        for part, value in shared.items():
            if value is not None:
                tensors[f"{name}.{part}"] = value.clone().cpu()
