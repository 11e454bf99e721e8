"""Put quantized linears into a model: from a checkpoint of any layout, or as they come out of the quantizer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine import ops
from engine.checkpoint.files import check_keys
from engine.checkpoint.folding import smooth_in_values
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import FORMAT, RECORDS, Quantization, read_quantization
from engine.checkpoint.source import Source
from engine.errors import CheckpointError
from engine.linear import Activation, AWQLinear, SVDQuantLinear
from engine.models.buffers import fill_buffers
from engine.models.plan import AWQ_TENSORS, SVDQ_TENSORS, LinearGroup, get_linear, replace_module

__all__ = [
    "FORMAT",
    "Family",
    "Quantization",
    "concatenate_rows",
    "expected_keys",
    "install",
    "is_kept",
    "load_quantized",
    "read_quantization",
]

_16BIT = (torch.bfloat16, torch.float16)
_FACTORS = ("wtscale", "wcscales")


class Family(Protocol):
    """What a model family module offers (engine.models.flux is one)."""

    MODEL_CLASS: str

    def prepare(self, model: Any) -> Any: ...
    def plan(self, model: Any) -> list[LinearGroup]: ...
    def fuse(self, model: Any) -> None: ...


def expected_keys(model: nn.Module, groups: Iterable[LinearGroup], quantization: Quantization) -> set[str]:
    """Names of all tensors that a canonical checkpoint of `model` must hold."""
    keys = set(model.state_dict())
    for group in groups:
        for name in group.names:
            linear = get_linear(model, name)
            keys.remove(f"{name}.weight")
            keys.update(f"{name}.{part}" for part in _parts(group, quantization))
            if linear.bias is not None:
                keys.add(f"{name}.bias")
    return keys


def optional_keys(groups: Iterable[LinearGroup], found: Iterable[str]) -> set[str]:
    """Those of `found` that a checkpoint may hold: scale factors of NVFP4, and what only serves to write it again."""
    keys = {name for name in found if name.startswith(RECORDS) or ".pag_to_v." in name}
    for group in groups:
        for name in group.names:
            keys.update(f"{name}.{part}" for part in (*_FACTORS, "bias", "smooth_orig"))
    return keys


def load_quantized(
    path: str | Path,
    model_class: type[nn.Module],
    family: Family,
    *,
    backend: str,
    activation: Activation,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Build a model with 4-bit linears from a checkpoint of any layout; tensors stream one group at a time.

    Raises CheckpointError when the file is damaged, of another model, or its keys or shapes differ.
    """
    with closing(open_checkpoint(path, device)) as files:
        quantization = read_quantization(files)
        if quantization.model_class != family.MODEL_CLASS:
            raise CheckpointError(f"{path}: made for {quantization.model_class}, expected {family.MODEL_CLASS}")
        model = _empty(path, model_class, family, quantization)
        groups = [group for group in family.plan(model) if not is_kept(group, quantization.keep)]
        if not quantization.shared_inputs:
            groups = [replace(group, fused=None) for group in groups]
        if not quantization.gelu_shift:
            groups = [replace(group, unsigned=False) for group in groups]
        required = expected_keys(model, groups, quantization)
        check_keys(path, set(files) - (optional_keys(groups, files) - required), required)
        for done, group in enumerate(groups, start=1):
            layers = {name: _read_layer(files, model, group, name, quantization) for name in group.names}
            install(model, group, layers, backend=backend, activation=activation, dtype=dtype)
            if (folded := smooth_in_values(files, group.names[0])) is not None:
                model.get_submodule(group.names[0]).folded_smooth = folded.cpu()
            if progress:
                progress(done, len(groups))
        _load_rest(model, files, dtype)
        config = dict(quantization.config)
        fill_buffers(model, lambda: model_class.from_config(config), device)  # pyright: ignore
    family.fuse(model)
    return model.eval().requires_grad_(False)


def _empty(path: str | Path, model_class: type[nn.Module], family: Family, quantization: Quantization) -> Any:
    """The model of a checkpoint's configuration, without weights."""
    try:
        with torch.device("meta"):
            return family.prepare(model_class.from_config(dict(quantization.config)))  # pyright: ignore
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: no {quantization.model_class} can be made from its model config ({error})"
        ) from error


Layer = ops.CanonicalLinear | ops.AwqWeight


def install(
    model: nn.Module,
    group: LinearGroup,
    layers: Mapping[str, Layer],
    *,
    backend: str,
    activation: Activation,
    dtype: torch.dtype,
) -> None:
    """Replace the linears of `group`; where the model can run them in one piece they are concatenated along N."""
    if group.fused and group.kind == "svdq":
        merged = concatenate_rows([layers[name] for name in group.names])  # pyright: ignore[reportArgumentType]
        layer = SVDQuantLinear(
            merged, backend=backend, activation=activation, dtype=dtype, unsigned_input=group.unsigned
        )
        replace_module(model, group.fused, layer)
        for name in group.names:
            replace_module(model, name, None)
        return
    for name in group.names:
        value = layers[name]
        if isinstance(value, ops.AwqWeight):
            replace_module(model, name, AWQLinear(value, backend=backend, dtype=dtype))
        else:
            layer = SVDQuantLinear(
                value, backend=backend, activation=activation, dtype=dtype, unsigned_input=group.unsigned
            )
            replace_module(model, name, layer)


def concatenate_rows(linears: Sequence[ops.CanonicalLinear]) -> ops.CanonicalLinear:
    """Stack linears that share smooth factor and down-projection into one of N1 + N2 + ... rows.

    Raises CheckpointError when they do not share them, since one quantized input could then not serve all.
    """
    first = linears[0]
    for other in linears[1:]:
        for part in ("smooth", "lora_down"):
            mine, theirs = getattr(first, part), getattr(other, part)
            if (mine is None) != (theirs is None) or (mine is not None and not torch.equal(mine, theirs)):
                raise CheckpointError(f"{part}: expected one and the same tensor for linears that share their input")
    rows = {
        part: torch.cat([getattr(linear, part) for linear in linears])
        for part in ("codes", "wscales", "wcscales", "lora_up", "bias")
        if getattr(first, part) is not None
    }
    scales = [linear.wtscale for linear in linears if linear.wtscale is not None]
    if any(not torch.equal(scales[0], scale) for scale in scales):
        # Tensor scales that differ become one scale a row.
        by_row = torch.cat([scale.expand(linear.n) for scale, linear in zip(scales, linears, strict=True)])
        return replace(first, **rows | {"wcscales": by_row * rows.get("wcscales", 1)}, wtscale=None)
    return replace(first, **rows)


def is_kept(group: LinearGroup, keep: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in group.names for pattern in keep)


def _parts(group: LinearGroup, quantization: Quantization) -> tuple[str, ...]:
    if group.kind == "awq":
        return AWQ_TENSORS
    return (*SVDQ_TENSORS, *(("lora_down", "lora_up") if quantization.rank else ()))


def _read_layer(files: Source, model: nn.Module, group: LinearGroup, name: str, quantization: Quantization) -> Layer:
    linear = get_linear(model, name)
    n, k, rank, size = linear.out_features, linear.in_features, quantization.rank, quantization.group_size
    shapes: dict[str, tuple[int, ...]] = {"codes": (n, k // 2), "bias": (n,)}
    if group.kind == "awq":
        shapes |= {"scales": (n, k // 64), "zeros": (n, k // 64)}
    else:
        shapes |= {"wscales": (n, -(-k // size)), "smooth": (k,), "wtscale": (1,), "wcscales": (n,)}
        shapes |= {"lora_down": (rank, k), "lora_up": (n, rank)}
    names = [*_parts(group, quantization), *(part for part in (*_FACTORS, "bias") if f"{name}.{part}" in files)]
    tensors = {part: _read(files, f"{name}.{part}", shapes[part]) for part in names}
    if group.kind == "awq":
        return ops.AwqWeight(**tensors)
    return ops.CanonicalLinear(**_widen(tensors, -k % 64, (k + -k % 64) // size))


def _widen(tensors: dict[str, Tensor], columns: int, groups: int) -> dict[str, Tensor]:
    """Add `columns` inputs that count for nothing, where K is no multiple of 64 (SANA's feed-forward)."""
    if not columns:
        return tensors
    scales = tensors["wscales"]
    more_scales = scales.new_zeros(len(scales), groups - scales.shape[1])  # NVFP4: groups of 16 in the added columns
    wide = {"codes": (columns // 2, 0), "smooth": (columns, 1), "lora_down": (columns, 0)}
    padded = {
        part: nn.functional.pad(tensors[part], (0, more), value=value)
        for part, (more, value) in wide.items()
        if part in tensors
    }
    return tensors | padded | {"wscales": torch.cat([scales, more_scales], dim=1)}


def _read(files: Source, name: str, shape: tuple[int, ...]) -> Tensor:
    if files.shape(name) != shape:
        raise CheckpointError(f"{files.path}: {name} has shape {files.shape(name)}, expected {shape}")
    return files[name]


def _load_rest(model: nn.Module, files: Source, dtype: torch.dtype) -> None:
    """Fill every remaining parameter, still on the meta device, from the file."""
    rest = {}
    for name, parameter in model.state_dict().items():
        if parameter.is_meta:
            value = _read(files, name, tuple(parameter.shape))
            rest[name] = value.to(dtype) if value.dtype in (*_16BIT, torch.float32) else value
    model.load_state_dict(rest, strict=False, assign=True)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise CheckpointError(f"{files.path}: {left[0]} and {len(left) - 1} more were not filled")
