"""LoRA at a strength that changes from call to call: in training, one for each row; after it, beside any layer.

`Strengthened` is lora.LoraLinear with a strength for each row of a batch, for training. `attach` puts a LoRA file
beside the layers of a finished transformer, 16-bit or quantized, whose layers need not be nn.Linear.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from zoo.train import lora


class Strengthened(lora.LoraLinear):
    """y = x W^T + b + s (x A^T) B^T, a strength s for each row. Shares its parameters with the layer it replaces."""

    def __init__(self, layer: lora.LoraLinear, strength: torch.Tensor) -> None:
        nn.Module.__init__(self)
        for name, value in layer.named_parameters():
            self.register_parameter(name, value)
        if layer.bias is None:
            self.bias = None
        self.register_buffer("strength", strength, persistent=False)  # (B,), one tensor for all layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.strength.view(-1, *([1] * (x.ndim - 1)))
        return F.linear(x, self.weight, self.bias) + rows.to(x.dtype) * F.linear(F.linear(x, self.lora_A), self.lora_B)


def strengthen(transformer: nn.Module, rows: int) -> torch.Tensor:
    """Give every LoRA layer of a transformer strengths. Returns the tensor (rows,) to write them to, all 1 at first.

    A tensor of one row serves batches of any size. Moving the module elsewhere breaks the tie to the tensor.
    """
    layers = lora.layers(transformer)
    strength = torch.ones(rows, device=next(iter(layers.values())).weight.device)
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, Strengthened(layer, strength))
    return strength


@dataclasses.dataclass
class Attached:
    """A LoRA beside a transformer's layers; call it with a strength, `detach` takes it away."""

    strength: torch.Tensor  # ()
    handles: list

    def __call__(self, alpha: float) -> None:
        self.strength.fill_(alpha)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def attach(transformer: nn.Module, folder: Path) -> Attached:
    """Put the LoRA file of a folder beside a transformer's layers, at strength 0.

    Finds layers of quantized transformers too, where q, k and v are one layer and a single block's output projection
    is two. Raises KeyError for a layer that is in none of these forms.
    """
    tensors, _ = lora.read_file(folder)
    at = next(transformer.parameters())
    kind = at.dtype if at.is_floating_point() else torch.bfloat16
    attached = Attached(torch.zeros((), device=at.device), [])
    names = sorted({key.rpartition(".lora_")[0] for key in tensors})
    fused: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in names:
        down, up = (tensors[f"{name}.lora_{part}.weight"].to(at.device, kind) for part in "AB")
        for place, columns in _places(transformer, name, down.shape[1]):
            fused.setdefault(place, []).append((down[:, columns], up))
    for place, parts in fused.items():
        _hook(transformer.get_submodule(place), parts, attached)
    return attached


_FUSED = (("to_q", "to_k", "to_v"), "to_qkv"), (("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")


def _places(transformer: nn.Module, name: str, wide: int) -> list[tuple[str, slice]]:
    """Which module does the work of layer `name`, and on which of its inputs; two for a split layer."""
    parent, _, leaf = name.rpartition(".")
    holder = transformer.get_submodule(parent)
    for parts, whole in _FUSED:
        if leaf in parts and hasattr(holder, whole):
            return [(f"{parent}.{whole}", slice(None))]
    module = getattr(holder, leaf, None)
    if module is None:
        raise KeyError(f"the transformer has no layer {name}")
    if hasattr(module, "split") and hasattr(module, "attn"):
        return [(f"{name}.attn", slice(0, module.split)), (f"{name}.mlp", slice(module.split, wide))]
    return [(name, slice(None))]


def _hook(module: nn.Module, parts: list[tuple[torch.Tensor, torch.Tensor]], attached: Attached) -> None:
    """Add the parts' changes to a module's output; parts of a fused layer fill its rows in their order."""
    out = getattr(module, "out_features", None)
    parts = _ordered(parts, out)

    def change(_module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        added = torch.cat([F.linear(F.linear(x.to(down.dtype), down), up) for down, up in parts], -1)
        return output + attached.strength.to(output.dtype) * added.to(output.dtype)

    attached.handles.append(module.register_forward_hook(change))


def _ordered(parts: list, out: int | None) -> list:
    # `names` is sorted, so fused parts come as k, q, v; the fused layer holds q, k, v.
    if len(parts) == 3:
        parts = [parts[1], parts[0], parts[2]]
    rows = sum(up.shape[0] for _, up in parts)
    if out is not None and rows != out:
        raise KeyError(f"a LoRA of {rows} rows does not fit a layer of {out}")
    return parts
