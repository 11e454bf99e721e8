"""Build the small FLUX's parts from a configuration, and write folders that FluxPipeline.from_pretrained opens."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel, T5Config, T5EncoderModel

from zoo.train import vocab
from zoo.train.positions import give_order

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
_CLASSES = {
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
}


@dataclasses.dataclass
class Parts:
    """The four networks of a FLUX pipeline."""

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel

    def named(self) -> dict[str, nn.Module]:
        return {name: getattr(self, name) for name in PARTS}

    def to(self, device: torch.device) -> Parts:
        for module in self.named().values():
            nn.Module.to(module, device)
        return self


def build(config: dict, tokenizers: Path) -> Parts:
    """New networks with random weights for `config`, sized to the tokenizer files in `tokenizers`."""
    clip_ids, t5_ids = vocab.encoders(tokenizers, config["max_sequence_length"])
    end = clip_ids.tokenizer.token_to_id("<|endoftext|>")
    clip = CLIPTextConfig(
        vocab_size=clip_ids.vocab_size, max_position_embeddings=vocab.CLIP_LENGTH, hidden_act="quick_gelu",
        bos_token_id=clip_ids.tokenizer.token_to_id("<|startoftext|>"), eos_token_id=end, pad_token_id=end,
        projection_dim=config["clip"]["hidden_size"], **config["clip"],
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=t5_ids.vocab_size, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False, **config["t5"],
    )  # fmt: skip
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=down, up_block_types=up, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
        sample_size=256, force_upcast=False, scaling_factor=1.0, shift_factor=0.0, **config["vae"],
    )  # fmt: skip
    transformer = FluxTransformer2DModel(**config["transformer"])
    initialize(transformer)
    reader = T5EncoderModel(t5)
    give_order(reader)
    return Parts(transformer, vae, CLIPTextModel(clip), reader)


def initialize(transformer: FluxTransformer2DModel) -> None:
    """DiT's start (Peebles & Xie 2023): Xavier matrices, zero modulation and output; every block begins as identity."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in transformer.time_text_embed.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    for name, module in transformer.named_modules():
        modulation = name.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear", "norm_out.linear"))
        if modulation or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def quiet() -> None:
    """No progress bars while weights are read and written: a log keeps lines, not their animation."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()


def load(folder: Path) -> Parts:
    """The networks of a pipeline folder, in float32."""
    folder = Path(folder)
    classes = (FluxTransformer2DModel, AutoencoderKL, CLIPTextModel, T5EncoderModel)
    found = [cls.from_pretrained(folder / name, dtype=torch.float32) for name, cls in zip(PARTS, classes, strict=True)]
    return Parts(*found)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def export(parts: Parts, scheduler: dict, tokenizers: Path, folder: Path, shard: str = "14MB") -> None:
    """Write a diffusers folder with BF16 weights in shards of at most `shard`.

    Written beside the target and moved into place, so an interrupted run leaves the last whole one.
    """
    folder = Path(folder)
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    for name, module in parts.named().items():
        save_bf16(module, new / name, shard)
    FlowMatchEulerDiscreteScheduler(**scheduler).save_pretrained(new / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(Path(tokenizers) / name, new / name)
    import diffusers

    index = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    index |= {name: list(value) for name, value in _CLASSES.items()}
    index |= {"image_encoder": [None, None], "feature_extractor": [None, None]}
    (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file in new.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_bf16(module: nn.Module, folder: Path, shard: str) -> None:
    """Save a BF16 copy of a diffusers or transformers model; the live one keeps its precision and its place."""
    if isinstance(module, PreTrainedModel):
        copy = type(module)(module.config)
    else:  # every value is given: from_config would put defaults back in place of values registered later
        copy = type(module)(**{name: value for name, value in module.config.items() if not name.startswith("_")})
    copy = nn.Module.to(copy, torch.bfloat16)
    copy.load_state_dict(
        {name: value.detach().to("cpu", torch.bfloat16) for name, value in module.state_dict().items()}
    )
    copy.save_pretrained(folder, max_shard_size=shard)
