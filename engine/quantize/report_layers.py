"""What each quantized layer of a checkpoint loses, measured on the inputs that the 16-bit model gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.graphs import unrecorded
from engine.models import loading
from engine.models.catalogue import ModelSpec
from engine.models.families import family
from engine.models.plan import LinearGroup, get_linear
from engine.quantize.naive import naive_error
from engine.quantize.records import LayerRecord
from engine.request import Request

__all__ = ["measure_layers"]

_ROWS = 512
Progress = Callable[[str, int, int], None]


@torch.inference_mode()
def measure_layers(
    engine: Any, spec: ModelSpec, precision: str, prompts: Sequence[str], steps: int | None, tell: Progress
) -> list[LayerRecord]:
    """Compare every quantized layer of `spec`'s checkpoint with the linears of the BF16 `engine`, input by input.

    The layers run as they would in a picture, on the backend of the device, once with 8-bit and once with 4-bit
    activations. The engine's transformer is prepared for quantizing (linears split in place), which stays correct
    and may change the last bits of its pictures, and is left on the CPU: both models need not fit side by side.
    """
    leaves = family(spec.family).leaves
    exact = leaves.prepare(engine.pipe.transformer)
    groups = leaves.plan(exact)
    rows = _watch(engine, exact, groups, prompts, steps)
    exact.to("cpu")
    errors: dict[str, dict[LinearGroup, float]] = {}
    for done, activation in enumerate(("w4a8", "w4a4"), start=1):
        close = loading.quantized_transformer(spec, precision, _backend(engine), activation, engine.device)  # pyright: ignore[reportArgumentType]
        pairs = ((group, _layers(close, group)) for group in groups)
        errors[activation] = {g: _error(exact, g, layers, rows[g]) for g, layers in pairs if layers}
        tell("measuring layers", done, 3)
    records = [
        LayerRecord(
            name=group.title,
            kind=group.kind,
            shape=(sum(get_linear(exact, name).out_features for name in group.names), rows[group].shape[1]),
            error_w4a4=errors["w4a4"][group],
            error_w4a8=errors["w4a8"][group],
            naive_error=naive_error(_weight(exact, group, engine.device), rows[group], group.kind, precision),
            seconds=None,
            names=group.names,
        )
        for group in groups
        if group in errors["w4a8"]
    ]
    tell("measuring layers", 3, 3)
    return records


def _backend(engine: Any) -> str:
    from engine import ops

    return ops.backends.select(engine.device).name


def _watch(
    engine: Any, model: nn.Module, groups: Sequence[LinearGroup], prompts: Sequence[str], steps: int | None
) -> Mapping[LinearGroup, Tensor]:
    """At most `_ROWS` rows (S, K) that each group reads while the prompts are painted, evenly over the steps."""
    seen: dict[LinearGroup, list[Tensor]] = {group: [] for group in groups}
    calls = len(prompts) * int(steps or engine.spec.steps.default)
    per_call = max(1, _ROWS // calls)

    def hook(group: LinearGroup) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            stride = max(1, len(flat) // per_call)
            # A start that moves from call to call visits other tokens at other steps.
            seen[group].append(flat[len(seen[group]) % stride :: stride][:per_call].cpu())

        return see

    hooks = [get_linear(model, group.names[0]).register_forward_pre_hook(hook(group)) for group in groups]
    try:
        with unrecorded(model):  # its linears were split since, and a replay calls no hooks
            for seed, prompt in enumerate(prompts):
                engine.run(Request(prompt, seed=seed, steps=steps))
    finally:
        for handle in hooks:
            handle.remove()
    return {group: torch.cat(parts)[-_ROWS:].to(engine.device) for group, parts in seen.items()}


def _layers(model: nn.Module, group: LinearGroup) -> list[nn.Module]:
    """The quantized modules that stand for a group, or none where it stayed in 16 bits."""
    modules = dict(model.named_modules())
    names = (group.fused,) if group.fused in modules else group.names
    found = [modules[name] for name in names if name in modules]
    return [] if any(isinstance(module, nn.Linear) for module in found) else found


def _error(exact: nn.Module, group: LinearGroup, layers: Sequence[nn.Module], rows: Tensor) -> float:
    wanted = rows.float() @ _weight(exact, group, rows.device).T
    bias: list[Tensor] = [get_linear(exact, name).bias for name in group.names]
    shifted = wanted if bias[0] is None else wanted + torch.cat(bias).to(rows.device, torch.float32)
    outputs = [layer(F.pad(rows, (0, layer.in_features - rows.shape[1]))) for layer in layers]  # pyright: ignore
    return _relative(torch.cat(outputs, -1).float() - shifted, wanted)


def _weight(model: nn.Module, group: LinearGroup, device: torch.device) -> Tensor:
    return torch.cat([get_linear(model, name).weight for name in group.names]).to(device, torch.float32)


def _relative(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm().clamp_min(1e-12))
