"""Contact sheets through the exported SanaPipeline and SanaPAGPipeline themselves, as a user gets them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin

from zoo.scenes.sheet import contact_sheet
from zoo.train.log import Log
from zoo.train.samples import prompts


@torch.no_grad()
def paint(
    pipe,
    texts: list[str],
    size: int,
    steps: int,
    guidance: float,
    seeds: Sequence[int] | None = None,
    batch: int = 32,
    **more: object,
) -> torch.Tensor:
    """Pictures (B, 3, size, size) uint8 of a SANA pipeline at its true size, each from its own seed's noise."""
    out = []
    seeds = seeds or [700_000 + i for i in range(len(texts))]
    if isinstance(pipe, PAGMixin):
        more = {"pag_scale": 0.0, **more}
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        latents = pipe(
            prompt=part, negative_prompt=[""] * len(part), num_inference_steps=steps, guidance_scale=guidance,
            height=size, width=size, use_resolution_binning=False, output_type="latent", return_dict=False,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[first : first + batch]], **more,
        )[0]  # fmt: skip
        # In float from the decoder on, as the engine does for one picture: 16 bits would round colours.
        latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)
        pixels = pipe.vae.decode(latents, return_dict=False)[0].float()
        out.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(out)


def sheets(model: Path, out: Path, config: dict, log: Log, device: torch.device) -> None:
    """Write JPEGs to `out`: the default call at the true size, with less guidance, with PAG, and at twice the size."""
    from diffusers import SanaPAGPipeline, SanaPipeline

    pipe = SanaPipeline.from_pretrained(model, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    layer = len(pipe.transformer.transformer_blocks) // 2
    pag = SanaPAGPipeline(**pipe.components, pag_applied_layers=f"transformer_blocks.{layer}")
    pag.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    texts, size, steps, guidance = prompts(config["count"]), config["size"], config["steps"], config["guidance"]
    few = texts[: max(1, config["count"] // 2)]
    kinds = (
        ("sana", pipe, texts, size, steps, guidance, {}),
        ("low_guidance", pipe, few, size, steps, 2.0, {}),
        ("few_steps", pipe, few, size, max(1, steps // 2), guidance, {}),
        ("pag", pag, few, size, steps, guidance, {"pag_scale": config["pag"]}),
        ("twice", pipe, few[:16], 2 * size, steps, guidance, {}),
    )
    for name, pipeline, said, side, count, scale, more in kinds:
        began = time.time()
        drawn = paint(pipeline, said, side, count, scale, **more)
        contact_sheet(drawn, said, columns=8, cell=config["cell"]).save(out / f"{name}.jpg", quality=85)
        log("samples", sheet=f"{name}.jpg", pictures=len(said), took=round(time.time() - began, 2))
