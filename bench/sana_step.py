"""One denoising step of SANA 1.6B at full size, this engine beside BF16, in one run.

    python bench/sana_step.py int4-eager bf16-eager bf16 --json FILE       # 1024x1024, batch 2 (guidance)
    python bench/sana_step.py int4-eager --profile

Weights are random, and the variants are named as in flux_step.py: compiled unless the name ends in `-eager`, each timed
as it is called and replayed as one CUDA graph. `int4-plain-eager` is `int4-eager` with diffusers' own blocks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.flux_step import measured, report
from bench.random_models import randomly_dense, randomly_quantized

CONFIG: dict[str, Any] = dict(
    in_channels=32, out_channels=32, num_attention_heads=70, attention_head_dim=32, num_layers=20,
    num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240, caption_channels=2304,
    mlp_ratio=2.5, sample_size=32, patch_size=1,
)  # fmt: skip


def inputs(size: int, batch: int) -> dict[str, Any]:
    """What a pipeline hands over at a step: 300 text tokens, of which a quarter is padding."""
    side, generator = size // 32, torch.Generator("cuda").manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    mask = torch.ones(batch, 300, device="cuda", dtype=torch.bfloat16)
    mask[:, 225:] = 0
    return dict(
        hidden_states=made(batch, 32, side, side), encoder_hidden_states=made(batch, 300, 2304),
        timestep=torch.full((batch,), 500.0, device="cuda"), encoder_attention_mask=mask, return_dict=False,
    )  # fmt: skip


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One variant."""
    from diffusers import SanaTransformer2DModel

    from engine.models import sana
    from engine.models.sana_blocks import unfuse_blocks

    def build() -> nn.Module:
        if not name.startswith("int4"):
            return randomly_dense(SanaTransformer2DModel, "cuda", CONFIG)
        model = randomly_quantized(SanaTransformer2DModel, sana, "cuda", CONFIG, "auto", options.rank)
        if "plain" in name:
            unfuse_blocks(model)
        return model

    return measured(name, build, lambda: inputs(options.size, options.batch), options)


def main() -> None:
    """Parse the command line, measure each variant, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["int4-eager", "bf16-eager", "bf16"])
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="print the slowest kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {"size": options.size, "batch": options.batch}
    report(options.variants, lambda name: measure(name, options), options.json, settings)


if __name__ == "__main__":
    main()
