"""Train a LoRA of a small FLUX on a folder of pictures, on a CPU in minutes, and merge it into a model of its own.

python examples/train_lora.py zoo/weights/flux-tiny my-pictures --out my-lora --merged my-flux

`my-pictures` holds pictures (.png, .jpg) with a caption each in a .txt of the same name. `my-lora` can be put on the
4-bit model as it is; `my-flux` is a diffusers folder that python -m engine.quantize takes. Flow matching as FLUX is
trained: the model sees (1 - s) picture + s noise and learns to answer noise - picture. Colours and layout are settled
in the first steps of painting, so a part of the noise levels s is drawn from there.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

TARGETS = [
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out",
]  # fmt: skip


def read(folder: Path, size: int) -> tuple[list[Image.Image], list[str]]:
    """Pictures, cut to squares of `size` pixels, and their captions; SystemExit when there are none."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    bare = [path.name for path in paths if not path.with_suffix(".txt").is_file()]
    if not paths or bare:
        raise SystemExit(
            f"pictures: expected .png or .jpg files in {folder}, each with a .txt of the same name,"
            f" got {f'none for {bare[0]}' if bare else 'no picture'}"
        )
    pictures = [ImageOps.fit(Image.open(path).convert("RGB"), (size, size)) for path in paths]
    return pictures, [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]


@torch.no_grad()
def encode(pipe: Any, pictures: list[Image.Image], captions: list[str], length: int) -> dict[str, Tensor]:
    """Packed latents (B, N, 64) of the pictures, embeddings of the captions and the places of both, on the CPU."""
    pixels = pipe.image_processor.preprocess(pictures).to(pipe.vae.dtype)
    latents = pipe.vae.encode(pixels).latent_dist.mean
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    b, c, h, w = latents.shape
    states, pooled, text_ids = pipe.encode_prompt(captions, None, max_sequence_length=length)
    return {
        "latents": pipe._pack_latents(latents, b, c, h, w).float(),
        "states": states.float(),
        "pooled": pooled.float(),
        "text_ids": text_ids.float(),
        "image_ids": pipe._prepare_latent_image_ids(b, h // 2, w // 2, latents.device, torch.float32),
    }


def time_shift(config: Any, tokens: int) -> float:
    """How far the sampler moves its steps towards noise for pictures of `tokens` tokens; 0 where it does not."""
    if not config.use_dynamic_shifting:
        return math.log(config.shift)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (tokens - config.base_image_seq_len)


def levels(count: int, shift: float, early: float, draw: torch.Generator) -> Tensor:
    """Noise levels (B,) in (0, 1): a logistic normal, shifted as the sampler's steps are; `early` of them 0.8 to 1."""
    usual = torch.sigmoid(torch.randn(count, generator=draw) + shift)
    first = 0.8 + 0.2 * torch.rand(count, generator=draw)
    return torch.where(torch.rand(count, generator=draw) < early, first, usual)


def train(transformer: Any, data: dict[str, Tensor], shift: float, options: argparse.Namespace) -> list[float]:
    """Fit the adapter of `transformer`, whose sampler shifts its steps by `shift`; returns the loss of each step."""
    learning = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.steps, pct_start=0.1)
    draw, losses, began = torch.Generator().manual_seed(options.seed), [], time.perf_counter()
    for step in range(options.steps):
        rows = torch.randint(len(data["latents"]), (options.batch,), generator=draw)
        clean = data["latents"][rows]
        noise = torch.randn(clean.shape, generator=draw)
        level = levels(options.batch, shift, options.early, draw)
        noisy = torch.lerp(clean, noise, level[:, None, None])
        found = transformer(
            hidden_states=noisy,
            encoder_hidden_states=data["states"][rows],
            pooled_projections=data["pooled"][rows],
            timestep=level,
            guidance=torch.full((options.batch,), options.guidance),
            img_ids=data["image_ids"],
            txt_ids=data["text_ids"],
            return_dict=False,
        )[0]
        loss = F.mse_loss(found, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            mean = sum(losses[-25:]) / 25
            print(f"step {step + 1}/{options.steps}, loss {mean:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    return losses


def save(pipe: Any, options: argparse.Namespace) -> None:
    """The LoRA as diffusers reads it and, where asked for, the whole pipeline with the LoRA in its weights."""
    from peft.utils import get_peft_model_state_dict

    factors = get_peft_model_state_dict(pipe.transformer)
    layers = {name: factor.bfloat16() for name, factor in factors.items()}
    pipe.save_lora_weights(options.out, transformer_lora_layers=layers)
    print(f"LoRA: {options.out}")
    if options.merged is None:
        return
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    # A folder of that name is a whole model or is not there.
    options.merged.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.merged.parent, prefix=f".{options.merged.name}-") as partial:
        whole = Path(partial) / options.merged.name
        torch.nn.Module.to(pipe.transformer, torch.bfloat16)
        pipe.save_pretrained(whole)
        whole.rename(options.merged)
    print(f"merged: {options.merged}")


def main(argv: list[str] | None = None) -> list[float]:
    """Read, train and write; returns the loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="folder of a FLUX pipeline")
    add("pictures", type=Path)
    add("--out", type=Path, required=True, help="folder for the LoRA")
    add("--merged", type=Path, help="folder, not there yet, for the model with the LoRA in it")
    add("--size", type=int, default=256, help="pixels of a side")
    add("--length", type=int, default=64, help="text tokens")
    add("--rank", type=int, default=16)
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=4)
    add("--rate", type=float, default=2e-3, help="learning rate at its highest")
    add("--early", type=float, default=0.5, help="part of the noise levels that are of the first steps, 0 to 1")
    add("--guidance", type=float, default=1.0, help="guidance that the model is told while it learns")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 <= options.early <= 1:
        parser.error(f"--early: expected a part from 0 to 1, got {options.early:g}")
    if options.merged and options.merged.exists():
        parser.error(f"--merged: expected a folder that is not there yet, got {options.merged}")
    import diffusers
    from peft import LoraConfig

    torch.manual_seed(options.seed)
    pictures, captions = read(options.pictures, options.size)
    pipe: Any = diffusers.FluxPipeline.from_pretrained(options.model, dtype=torch.bfloat16)
    data = encode(pipe, pictures, captions, options.length)
    pipe.transformer.float().requires_grad_(False)
    pipe.transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=TARGETS))
    shift = time_shift(pipe.scheduler.config, data["latents"].shape[1])
    losses = train(pipe.transformer.train(), data, shift, options)
    save(pipe, options)
    return losses


if __name__ == "__main__":
    main()
