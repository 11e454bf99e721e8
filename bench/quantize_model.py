"""A diffusers FLUX folder of random BF16 weights with planted outliers: full size, with nothing to download.

Random weights say nothing of pictures, but quantizing them takes as long as real ones, and the outliers give smoothing
and branch their work: a few channels of what each linear reads are far larger than the others. The text encoders are
those of the small model that ships, so that the pipeline opens; who runs the model brings embeddings of its own.
Tensors are made on the device and written one at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.random_models import CONFIG
from engine.checkpoint.writer import FileWriter
from engine.models.catalogue import zoo_folder

__all__ = ["CONFIG", "TINY", "write_model"]

TINY: dict[str, Any] = CONFIG | dict(num_layers=1, num_single_layers=2, num_attention_heads=2, joint_attention_dim=64)

_SHARD_BYTES = 2 * 2**30
_FILE = "diffusion_pytorch_model"
# Linears whose output channels are the input channels of the next one.
_FEEDS = (".to_v.weight", ".add_v_proj.weight", ".net.0.proj.weight", ".proj_mlp.weight")
_NORMS = {".norm1.linear.bias": 6, ".norm1_context.linear.bias": 6, ".norm.linear.bias": 3}


def write_model(
    folder: Path, config: dict[str, Any], device: torch.device, outliers: int = 8, size: float = 10.0, seed: int = 0
) -> int:
    """Write the pipeline folder; `outliers` input channels of each linear are `size` times the others.

    Returns the parameters of the transformer. The same seed on the same kind of device writes the same bytes.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    (folder / "transformer").mkdir(parents=True)
    model.save_config(folder / "transformer")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _write_shards(folder / "transformer", shapes, device, outliers, size, seed)
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    torch.manual_seed(seed)
    # Nothing is decoded; the pipeline reads only how many pixels a latent stands for.
    AutoencoderKL(
        latent_channels=16, block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, scaling_factor=0.3611, shift_factor=0.1159,
        use_quant_conv=False, use_post_quant_conv=False,
    ).bfloat16().save_pretrained(folder / "vae")  # fmt: skip
    _copy_encoders(folder)
    return sum(shape.numel() for shape in shapes.values())


def _write_shards(
    folder: Path, shapes: dict[str, torch.Size], device: torch.device, outliers: int, size: float, seed: int
) -> None:
    generator = torch.Generator(device).manual_seed(seed)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * shape.numel() > _SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * shape.numel()
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{_FILE}-{number:05d}-of-{len(shards):05d}.safetensors"
        with FileWriter(folder / file, len(names), metadata={"format": "pt"}) as out:
            for name in names:
                out.add(name, _tensor(name, shapes[name], generator, outliers, size))
        where |= dict.fromkeys(names, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{_FILE}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _tensor(name: str, shape: torch.Size, generator: torch.Generator, outliers: int, size: float) -> Tensor:
    draw: dict[str, Any] = dict(generator=generator, device=generator.device)
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape, dtype=torch.bfloat16, device=generator.device)  # of an RMS norm
    # Random numbers are drawn in BF16 at once: twice as fast as in float32, and half the memory.
    tensor = torch.randn(shape, dtype=torch.bfloat16, **draw).mul_(0.02 if len(shape) == 1 else shape[1] ** -0.5)
    inside = "transformer_blocks." in name
    if inside and name.endswith(_FEEDS):
        tensor[_channels(shape[0], outliers, draw)] *= size
    chunks = next((count for ending, count in _NORMS.items() if inside and name.endswith(ending)), 0)
    if chunks:
        width = shape[0] // chunks
        # Modulations come as shift, scale, gate; a large scale makes an outlier of its channel.
        for scale in range(1, chunks, 3):
            tensor[scale * width + _channels(width, outliers, draw)] += size
    return tensor


def _channels(count: int, outliers: int, draw: dict[str, Any]) -> Tensor:
    return torch.randperm(count, **draw)[:outliers]


def _copy_encoders(folder: Path) -> None:
    source = zoo_folder() / "flux-tiny"
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(source / part, folder / part)
    shutil.copy(source / "model_index.json", folder)
