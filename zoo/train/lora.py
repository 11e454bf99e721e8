"""LoRA for the small FLUX: put it into a transformer, train it, save it as diffusers reads it, merge it.

Files hold `transformer.{module}.lora_A.weight` (R, K) and `.lora_B.weight` (N, R), as FLUX.1-Depth-dev-lora does, and
scale 1: W becomes W + B A. A wider input (control and fill models see more channels than the base) is part of the same
file: the input embedding's lora_A simply has more columns than the base's weight, which `load_lora_weights` widens.

As a command, merge such a file into a pipeline folder of its own:

    python -m zoo.train.lora --base zoo/weights/flux-tiny --lora zoo/weights/canny-tiny --out DIR \
        --pipeline FluxControlPipeline
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "pytorch_lora_weights.safetensors"
EMBEDDER = "x_embedder"
# Attention and feed-forward of the picture's stream, and the blocks that hold both streams.
TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",
    r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
    r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)",
)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank change: y = x (W + B A)^T + b.

    The change is added to the weight rather than computed beside it: at this size one product costs less than three.
    """

    def __init__(self, base: nn.Linear, rank: int, in_features: int | None = None) -> None:
        super().__init__()
        n, k = base.weight.shape
        wide = in_features or k
        weight = F.pad(base.weight.detach(), (0, wide - k))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(torch.empty(rank, wide, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(n, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def merged(self) -> torch.Tensor:
        """W + B A, (N, K) float32."""
        return self.weight.float() + self.lora_B.float() @ self.lora_A.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight + self.lora_B @ self.lora_A, self.bias)


def inject(transformer: FluxTransformer2DModel, rank: int, in_channels: int, read: torch.Tensor,
           targets: tuple[str, ...] = TARGETS) -> list[str]:  # fmt: skip
    """Freeze a transformer, put LoRA into its linears whose whole name matches one of `targets`, widen its input.

    `read` (R, in_channels) is how the input embedding's lora_A starts: which mixtures of the new channels it sees.
    Returns the names of the layers that now learn. Raises ValueError when no name matches.
    """
    transformer.requires_grad_(False)
    pattern = re.compile("|".join(f"(?:{t})" for t in targets))
    names = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)]
    if not names:
        raise ValueError(f"no linear layer of the transformer matches {targets}")
    for name in names:
        _replace(transformer, name, LoraLinear(transformer.get_submodule(name), rank))
    embedder = LoraLinear(transformer.get_submodule(EMBEDDER), len(read), in_channels)
    with torch.no_grad():
        embedder.lora_A.copy_(read)
    _replace(transformer, EMBEDDER, embedder)
    transformer.register_to_config(in_channels=in_channels, out_channels=transformer.out_channels)
    return [*names, EMBEDDER]


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def layers(transformer: nn.Module) -> dict[str, LoraLinear]:
    """The layers that learn, by name."""
    return {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLinear)}


def save(transformer: nn.Module, folder: Path, about: dict[str, str] | None = None) -> int:
    """Write the LoRA of a transformer to `folder` in BF16. Returns the file's size in bytes.

    The ranks are written out too: readers of diffusers' metadata then need not guess the scale of layers whose rank
    differs. Written beside the target and moved into place.
    """
    found = layers(transformer)
    tensors = {}
    for name, layer in found.items():
        for part in ("lora_A", "lora_B"):
            value = getattr(layer, part).detach().to("cpu", torch.bfloat16)
            tensors[f"transformer.{name}.{part}.weight"] = value.contiguous()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS + ".part")
    adapter = {f"transformer.{key}": value for key, value in _peft_config(found).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    save_file(tensors, part, header | (about or {}))
    os.replace(part, folder / WEIGHTS)
    return (folder / WEIGHTS).stat().st_size


def _peft_config(found: dict[str, LoraLinear]) -> dict:
    ranks = {name: layer.lora_A.shape[0] for name, layer in found.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {name: rank for name, rank in ranks.items() if rank != usual}
    scale = {"r": usual, "lora_alpha": usual, "rank_pattern": other, "alpha_pattern": other}
    return {**scale, "target_modules": list(ranks)}


def read_file(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by key without the leading `transformer.`, and the file's metadata."""
    path = Path(folder) / WEIGHTS
    with safe_open(path, "pt") as file:
        about = dict(file.metadata() or {})
    return {key.removeprefix("transformer."): value for key, value in load_file(path).items()}, about


def restore(transformer: nn.Module, folder: Path) -> None:
    """Read back what `save` wrote into the layers that learn.

    Raises ValueError when the file has other layers or other shapes.
    """
    tensors, _ = read_file(folder)
    learning = {f"{name}.{part}.weight": getattr(layer, part)
                for name, layer in layers(transformer).items() for part in ("lora_A", "lora_B")}  # fmt: skip
    wrong = sorted(k for k in {*learning, *tensors}
                   if k not in learning or k not in tensors or learning[k].shape != tensors[k].shape)  # fmt: skip
    if wrong:
        raise ValueError(f"{folder} does not fit the layers that learn: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for key, parameter in learning.items():
            parameter.copy_(tensors[key])


def merge(base: Path, folder: Path) -> FluxTransformer2DModel:
    """The base's transformer with a LoRA file added to its weights and its input widened, in float32.

    Raises KeyError for a layer the base does not have.
    """
    transformer = FluxTransformer2DModel.from_pretrained(Path(base) / "transformer", dtype=torch.float32)
    tensors, _ = read_file(folder)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    weights = transformer.state_dict()
    for name in names:
        delta = tensors[f"{name}.lora_B.weight"].float() @ tensors[f"{name}.lora_A.weight"].float()
        weight = weights[f"{name}.weight"]
        weights[f"{name}.weight"] = F.pad(weight, (0, delta.shape[1] - weight.shape[1])) + delta
    in_channels = weights[f"{EMBEDDER}.weight"].shape[1]
    config = {**transformer.config, "in_channels": in_channels, "out_channels": transformer.out_channels}
    merged = FluxTransformer2DModel.from_config(config)
    merged.load_state_dict(weights)
    return merged.eval().requires_grad_(False)


def write_folder(base: Path, folder: Path, pipeline: str, out: Path, shard: str = "14MB") -> None:
    """A pipeline folder of its own: the merged transformer in BF16, everything else linked to the base (or copied)."""
    from zoo.train.models import save_bf16

    base, out = Path(base), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    save_bf16(merge(base, folder), out / "transformer", shard)
    index = json.loads((base / "model_index.json").read_text())
    for name in index:
        if (base / name).is_dir() and name != "transformer":
            _share(base / name, out / name)
    index = {k: v for k, v in index.items() if k not in ("image_encoder", "feature_extractor")}
    (out / "model_index.json").write_text(json.dumps({**index, "_class_name": pipeline}, indent=2) + "\n")


def _share(source: Path, target: Path) -> None:
    if target.is_symlink() or target.exists():
        return
    try:
        target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()), target_is_directory=True)
    except OSError:  # a file system without links
        shutil.copytree(source, target)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Merge a LoRA into a pipeline folder of its own.")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--lora", type=Path, required=True)
    pipelines = ("FluxControlPipeline", "FluxFillPipeline", "FluxPipeline")
    parser.add_argument("--pipeline", choices=pipelines, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    write_folder(args.base, args.lora, args.pipeline, args.out)


if __name__ == "__main__":
    main()
