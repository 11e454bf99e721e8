"""Quantize the linears of one block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.files import all_finite
from engine.errors import ModelError
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.inputs import Inputs
from engine.quantize.layer import Recipe, quantize_group, quantize_weight_only
from engine.quantize.naive import naive_error
from engine.quantize.records import LayerRecord
from engine.quantize.streamed import StreamedModel

__all__ = ["quantize_block", "quantize_linears"]


def quantize_block(
    streamed: StreamedModel,
    block: str,
    groups: Sequence[LinearGroup],
    inputs: Mapping[LinearGroup, Inputs],
    recipe: Recipe,
    on_group: Callable[[LinearGroup], None],
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    """Read a block, quantize its `groups` and return its canonical tensors, on the CPU, with the figures of each group.

    Groups that are not in `inputs` are quantized without data. Raises ModelError for weights that are no numbers.
    """
    figures = []
    replaced = {f"{name}.weight" for group in groups for name in group.names}
    with streamed.block(block) as module:
        whole = {f"{block}.{name}": value for name, value in module.state_dict().items()}
        tensors = {name: value.cpu() for name, value in whole.items() if name not in replaced}
        for group in groups:
            figures.append(quantize_linears(streamed.model, group, inputs.get(group), recipe, tensors))
            on_group(group)
        # Copies: what comes from a file is the file's own memory, and the file may be replaced.
        return {name: value.clone() for name, value in tensors.items()}, figures


def quantize_linears(
    model: Any, group: LinearGroup, inputs: Inputs | None, recipe: Recipe, tensors: dict[str, Tensor]
) -> LayerRecord:
    """Put the quantized linears of `group` into `tensors`; their weights, if they are in it, go.

    Without `inputs` every input channel counts alike, and the record's errors are those on such inputs.
    """
    linears = [get_linear(model, name) for name in group.names]
    for name, linear in zip(group.names, linears, strict=True):
        if not all_finite(linear.weight):
            raise ModelError(f"{name}.weight holds NaN or infinity; the model is damaged: fetch or make it again")
    weight = torch.cat([linear.weight for linear in linears]).float()
    seen = inputs or Inputs.unknown(weight.shape[1], weight.device)
    parts, shared, errors = _quantize(weight, group, seen, recipe)
    _write_rows(group, [linear.out_features for linear in linears], parts, shared, tensors)
    n, k = weight.shape
    naive = None if seen.rows is None else naive_error(weight, seen.rows, group.kind, recipe.precision)
    return LayerRecord(group.title, group.kind, (n, k), *errors, naive_error=naive, seconds=None, names=group.names)


_Parts = dict[str, Tensor | None]


def _quantize(
    weight: Tensor, group: LinearGroup, inputs: Inputs, recipe: Recipe
) -> tuple[_Parts, _Parts, tuple[float, float]]:
    """Tensors that each linear has rows of, tensors that all of them share, and the errors W4A4 and W4A8."""
    if group.kind == "awq":
        value, error = quantize_weight_only(weight, inputs, recipe)
        return {"codes": value.codes, "scales": value.scales, "zeros": value.zeros}, {}, (error, error)
    done = quantize_group(weight, inputs, recipe, unsigned=group.unsigned and recipe.shift)
    linear, k = done.linear, weight.shape[1]
    groups = -(-k // linear.group)  # files hold the inputs that exist, in whole groups
    parts = {"codes": linear.codes[:, : k // 2], "wscales": linear.wscales[:, :groups], "lora_up": linear.lora_up}
    shared: _Parts = {"smooth": linear.smooth, "lora_down": linear.lora_down}
    shared = {part: value if value is None else value[..., :k] for part, value in shared.items()}
    return parts, shared | {"wtscale": linear.wtscale}, (done.error, done.error_w4a8)


def _write_rows(group: LinearGroup, rows: list[int], parts: _Parts, shared: _Parts, tensors: dict[str, Tensor]) -> None:
    """Give each linear of the group its own rows and a copy of what they share; biases stay as they are."""
    split = {part: value.split(rows) for part, value in parts.items() if value is not None}
    for index, name in enumerate(group.names):
        tensors.pop(f"{name}.weight", None)
        for part, pieces in split.items():
            tensors[f"{name}.{part}"] = pieces[index].clone().cpu()
        for part, value in shared.items():
            if value is not None:
                tensors[f"{name}.{part}"] = value.clone().cpu()
