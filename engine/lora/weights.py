"""A LoRA in one form, whatever its file looks like: factors by diffusers module name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint.files import TensorFiles, all_finite
from engine.errors import CheckpointError
from engine.lora.detect import LoraFormat, detect_format
from engine.lora.names import is_foreign, module_of, parse
from engine.lora.scaling import Scaling, read_scaling

__all__ = ["Factors", "LoraWeights", "from_tensors", "read_lora"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Factors(NamedTuple):
    """delta W = up @ down, with down (R, K) and up (N, R); alpha is already multiplied in."""

    down: Tensor
    up: Tensor


@dataclass
class LoraWeights:
    """Low-rank deltas, bias deltas (N) and replacement norm weights by diffusers module name.

    `left_out` lists keys of the file that are for other models (text encoders) or known to be no low-rank delta,
    `unknown` those that nothing is known of.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def modules(self) -> list[str]:
        """Every module that something is for."""
        return sorted({*self.factors, *self.biases, *self.norms})

    def tensors(self, prefix: str = "transformer.") -> dict[str, Tensor]:
        """The same in diffusers' own keys, ready for safetensors."""
        found: dict[str, Tensor] = {}
        for name, (down, up) in self.factors.items():
            found |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        found |= {f"{prefix}{name}.lora_B.bias": bias for name, bias in self.biases.items()}
        found |= {f"{prefix}{name}.weight": norm for name, norm in self.norms.items()}
        # Linears that were split from one share their down-projection; files hold a copy each.
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def read_lora(path: str | Path, expected: LoraFormat | None = None) -> LoraWeights:
    """Read a LoRA file of any format but nunchaku's own runtime form (see engine.lora.published).

    Raises CheckpointError when the file is damaged, is another kind of adapter, or is not in the `expected` format.
    """
    with TensorFiles(path) as files:
        try:
            found = detect_format(files)
            if expected is not None and found != expected:
                raise CheckpointError(f"its keys are those of {found}, not of {expected}; leave the format to auto")
            scaling = read_scaling(files.path, files.metadata)
            # What is not for the transformer is listed, not read.
            foreign = {name for name in files if is_foreign(name)}
            mine = {name for name in files if name not in foreign and parse(name) is not None}
            lora = from_tensors({name: files[name] for name in mine}, found, scaling)
            lora.left_out = sorted({*lora.left_out, *foreign})
            lora.unknown = sorted(set(files) - mine - foreign)
            return lora
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error


def from_tensors(
    tensors: Mapping[str, Tensor], form: LoraFormat | None = None, scaling: Scaling | None = None
) -> LoraWeights:
    """Bring the tensors of a LoRA file into one form; `scaling` is for modules without an alpha of their own.

    Raises CheckpointError as `read_lora` does.
    """
    scaling = scaling or Scaling()
    form = form or detect_format(tensors)
    if form == "nunchaku":
        raise CheckpointError("this LoRA is in nunchaku's runtime form; load it onto the checkpoint it was made for")
    lora = LoraWeights()
    for module, parts in _collect(tensors, lora).items():
        _add_norms(lora, module, parts)
        if "down" in parts or "up" in parts:
            _add_factors(lora, module, parts, scaling, kohya=form in ("comfyui", "kohya_diffusers"))
        elif "alpha" in parts:
            lora.left_out.append(f"{module}.alpha")
        if "bias" in parts:
            _add_bias(lora, module, parts["bias"])
    if not lora.factors:
        raise CheckpointError("it holds no low-rank factors for a transformer")
    return lora


def _collect(tensors: Mapping[str, Tensor], lora: LoraWeights) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        parsed = None if is_foreign(key) else parse(key)
        if parsed is None:
            (lora.left_out if is_foreign(key) else lora.unknown).append(key)
            continue
        tensor = tensors[key]
        if tensor.dtype not in _FLOATS:
            # Some files are saved in 8 bits to be small; kernels and sums want 16. Wider numbers are alphas.
            tensor = tensor.to(torch.bfloat16 if tensor.element_size() == 1 else torch.float32)
        if not all_finite(tensor):
            raise CheckpointError(f"{key} holds NaN or infinity; the file is damaged")
        parts = modules.setdefault(parsed.module, {})
        if parsed.part in parts:
            raise CheckpointError(f"{parsed.module} comes twice, in two spellings")
        parts[parsed.part] = tensor
    return modules


def _add_factors(lora: LoraWeights, module: str, parts: Mapping[str, Tensor], scaling: Scaling, kohya: bool) -> None:
    if "down" not in parts or "up" not in parts:
        raise CheckpointError(f"{module} has only one of its two factors; the file is incomplete")
    # 1x1 convolutions are linears over channels.
    down, up = (tensor.flatten(1) if tensor.ndim == 4 else tensor for tensor in (parts["down"], parts["up"]))
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(f"{module}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise CheckpointError(f"{module}.alpha: expected one number, got shape {tuple(parts['alpha'].shape)}")
        down, up = _with_alpha(down, up, float(parts["alpha"]), kohya)
    elif (scale := scaling.of(module, down.shape[0])) != 1:
        down = down * scale
    names, swapped = module_of(module)
    if swapped:
        # BFL's last modulation is (shift, scale), diffusers' is (scale, shift).
        up = torch.cat(up.chunk(2)[::-1])
    for name, factors in _split(names, Factors(down, up)).items():
        if name in lora.factors:
            raise CheckpointError(f"{module}: {name} is given twice, under two names")
        lora.factors[name] = factors


def _with_alpha(down: Tensor, up: Tensor, alpha: float, kohya: bool) -> tuple[Tensor, Tensor]:
    """Multiply alpha / rank in; kohya's is spread over both factors by powers of two, which keeps small ones normal."""
    scale_down, scale_up = alpha / down.shape[0], 1.0
    while kohya and 0 < scale_down * 2 < scale_up:
        scale_down, scale_up = scale_down * 2, scale_up / 2
    return down * scale_down, up * scale_up


def _split(names: tuple[str, ...], whole: Factors) -> dict[str, Factors]:
    """Give each stacked module its rows; a block-diagonal `up` is cut into its blocks, so ranks stay small."""
    if len(names) == 1:
        return {names[0]: whole}
    ups = whole.up.split(_rows(names, whole.up.shape[0]))
    rank = whole.down.shape[0]
    if rank % len(names) == 0 and _is_block_diagonal(ups, rank // len(names)):
        each = rank // len(names)
        blocks = [slice(i * each, (i + 1) * each) for i in range(len(names))]
        return {name: Factors(whole.down[b], up[:, b]) for name, up, b in zip(names, ups, blocks, strict=True)}
    return {name: Factors(whole.down, up) for name, up in zip(names, ups, strict=True)}


def _rows(names: tuple[str, ...], total: int) -> list[int]:
    """Rows of each stacked module: q, k and v are equally wide, linear1 adds an MLP of four times that."""
    shares = [1, 1, 1] if len(names) == 3 else [1, 1, 1, 4]
    if len(names) != len(shares) or total % sum(shares):
        raise CheckpointError(f"{names[0]}: {total} rows do not split over it and the layers stacked with it")
    return [share * total // sum(shares) for share in shares]


def _is_block_diagonal(ups: Iterable[Tensor], each: int) -> bool:
    for index, up in enumerate(ups):
        outside = up.clone()
        outside[:, index * each : (index + 1) * each] = 0
        if bool(outside.any()):
            return False
    return True


def _add_bias(lora: LoraWeights, module: str, bias: Tensor) -> None:
    names, swapped = module_of(module)
    bias = torch.cat(bias.chunk(2)[::-1]) if swapped else bias
    pieces = (bias,) if len(names) == 1 else bias.split(_rows(names, bias.numel()))
    lora.biases |= dict(zip(names, pieces, strict=True))


def _add_norms(lora: LoraWeights, module: str, parts: Mapping[str, Tensor]) -> None:
    names, _ = module_of(module)
    if "norm" in parts:
        lora.norms[module] = parts["norm"]
    for part, name in zip(("query_norm", "key_norm"), names, strict=False):
        if part in parts:
            lora.norms[name] = parts[part]
