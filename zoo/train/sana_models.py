"""Build the small SANA's parts from a configuration, and export a folder that SanaPipeline.from_pretrained opens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch import nn
from transformers import Gemma2Model

from zoo.train import sana_text
from zoo.train.models import save_bf16

PARTS = ("transformer", "vae", "text_encoder")
_CLASSES = {
    "transformer": ("diffusers", "SanaTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderDC"),
    "scheduler": ("diffusers", "DPMSolverMultistepScheduler"),
    "text_encoder": ("transformers", "Gemma2Model"),
    "tokenizer": ("transformers", "GemmaTokenizerFast"),
}
# The solver that SANA's own folders name, with flow sigmas.
_SOLVER = {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "final_sigmas_type": "zero",
}  # fmt: skip


@dataclasses.dataclass
class Parts:
    """The three networks of a SANA pipeline."""

    transformer: SanaTransformer2DModel
    vae: AutoencoderDC
    text_encoder: Gemma2Model

    def named(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in PARTS}

    def to(self, device: torch.device) -> Parts:
        for module in self.named().values():
            nn.Module.to(module, device)
        return self


def build(config: dict, vocab_size: int) -> Parts:
    """New networks with random weights for `config`."""
    transformer = SanaTransformer2DModel(**config["transformer"])
    initialize(transformer)
    vae = AutoencoderDC(**config["vae"])
    return Parts(transformer, vae, sana_text.build_encoder(config["gemma"], vocab_size))


def initialize(transformer: SanaTransformer2DModel) -> None:
    """SANA's start: Xavier matrices; cross-attention and the last layer begin at zero, modulation near it."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            matrix = module.weight.flatten(1)
            nn.init.xavier_uniform_(matrix)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (transformer.time_embed, transformer.caption_projection):
        for each in module.modules():
            if isinstance(each, nn.Linear):
                nn.init.normal_(each.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


def load(folder: Path, config: dict | None = None) -> Parts:
    """The networks of a pipeline folder, in float32.

    With `config`, that of a run, the transformer gets its options, as long as the folder's weights fit them.
    """
    classes = (SanaTransformer2DModel, AutoencoderDC, Gemma2Model)
    found = [
        cls.from_pretrained(Path(folder) / name, dtype=torch.float32) for name, cls in zip(PARTS, classes, strict=True)
    ]
    parts = Parts(*found)
    if config:
        told = SanaTransformer2DModel(**config["transformer"])
        told.load_state_dict(parts.transformer.state_dict())
        parts.transformer = told
    return parts


def export(parts: Parts, flow_shift: float, tokenizer: Path, folder: Path, shard: str = "14MB") -> None:
    """Write a diffusers folder with BF16 weights in shards of at most `shard`.

    Written beside the target and moved into place, so an interrupted run leaves the last whole one.
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    for name, module in parts.named().items():
        save_bf16(module, new / name, shard)
    DPMSolverMultistepScheduler(flow_shift=flow_shift, **_SOLVER).save_pretrained(new / "scheduler")
    shutil.copytree(tokenizer, new / "tokenizer")
    import diffusers

    index = {"_class_name": "SanaPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: list(value) for name, value in _CLASSES.items()}
    (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)
