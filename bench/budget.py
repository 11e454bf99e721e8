"""A picture of FLUX.1-dev at full size within so many GiB of a GPU: this engine beside diffusers' offloading of BF16.

    python bench/budget.py ours --gib 16 --json FILE     # 4-bit transformer and T5, all on the GPU
    python bench/budget.py room --gib 12                 # T5 in BF16: networks come for their calls (--vram-budget)
    python bench/budget.py sequential --gib 16           # also: model, group (leaves, a stream, pinned memory)
    python bench/budget.py ours --tiny --device cpu      # a try on a CPU

Weights are random, of both text encoders and the VAE too, so nothing is downloaded; prompts are random tokens. The
budget is kept by torch's allocator, which refuses what is above it. Seconds are of encoding, steps and decoding, after
a picture of one step that is not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from bench.flux_step import GIB
from bench.random_models import CONFIG, quantized, random_layer, randomly_dense
from engine.residency import room_on

METHODS = ("ours", "room", "sequential", "model", "group")
T5 = dict(
    vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)  # fmt: skip
CLIP = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
VAE: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
    scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
TINY = {
    "transformer": CONFIG | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
                             "joint_attention_dim": 128, "pooled_projection_dim": 64},
    "t5": T5 | {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4},
    "clip": CLIP | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vae": VAE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}  # fmt: skip
FULL = {"transformer": CONFIG, "t5": T5, "clip": CLIP, "vae": VAE}


def t5_encoder(**config: Any) -> nn.Module:
    """A T5 encoder in the default dtype."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


def clip_encoder(**config: Any) -> nn.Module:
    """A CLIP text encoder in the default dtype."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def four_bit_t5(device: str, config: dict) -> nn.Module:
    """The T5 encoder with random 4-bit weights."""
    from engine import ops
    from engine.linear import AWQLinear
    from engine.models.plan import replace_module

    where = torch.device(device)
    backend, draw = ops.backends.select(where).name, torch.Generator(where).manual_seed(0)
    with torch.device("meta"):
        model: Any = t5_encoder(**config)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            weight = random_layer(linear.out_features, linear.in_features, "awq", 0, False, device, draw)
            layer = AWQLinear(weight, backend=backend, dtype=torch.bfloat16)
            layer.weight = None  # pyright: ignore[reportArgumentType]  # as in engine.models.t5
            replace_module(model, name, layer)
    rest = {name: torch.randn(p.shape, generator=draw, device=where, dtype=torch.bfloat16) * 0.02
            for name, p in model.state_dict().items() if p.is_meta}  # fmt: skip
    model.load_state_dict(rest, strict=False, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def pipeline(method: str, device: str, sizes: dict[str, dict]) -> Any:
    """A pipeline of random parts, on the device or, for offloading, on the host."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    home = device if method == "ours" else "cpu"

    def dense(kind: Any, config: dict) -> Any:
        return randomly_dense(kind, device, config).to(home)

    transformer = (quantized(device, sizes["transformer"], "auto", 32) if method in ("ours", "room")
                   else dense(FluxTransformer2DModel, sizes["transformer"]))  # fmt: skip
    if method == "room":
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data.cpu()
    encoder = four_bit_t5(device, sizes["t5"]) if method == "ours" else dense(t5_encoder, sizes["t5"])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline_class: Any = FluxPipeline  # its types know no pipeline without tokenizers
    pipe = pipeline_class(
        scheduler=scheduler, vae=dense(AutoencoderKL, sizes["vae"]), text_encoder=dense(clip_encoder, sizes["clip"]),
        tokenizer=None, text_encoder_2=encoder, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def settle(pipe: Any, method: str, device: str, gib: float) -> None:
    """Put the method into effect."""
    if method in ("ours", "room"):
        from engine import graphs

        graphs.record(pipe.transformer)
        if method == "room":
            room_on(torch.device(device), gib).seat(pipe)
    elif method == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif method == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        from diffusers.hooks import apply_group_offloading

        for part in (pipe.vae, pipe.text_encoder):
            part.to(device)
        for part in (pipe.transformer, pipe.text_encoder_2):
            apply_group_offloading(part, torch.device(device), offload_type="leaf_level", use_stream=True)


@torch.inference_mode()
def picture(pipe: Any, device: str, size: int, steps: int) -> tuple[dict[str, float], Any]:
    """Seconds of each stage, and the picture."""
    draw = torch.Generator().manual_seed(0)
    laps, begun = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begun
        if device != "cpu":
            torch.cuda.synchronize()
        laps[name], begun = time.perf_counter() - begun, time.perf_counter()

    def tokens(encoder: Any, length: int) -> Tensor:
        return torch.randint(0, encoder.config.vocab_size, (1, length), generator=draw).to(device)

    embeds = pipe.text_encoder_2(tokens(pipe.text_encoder_2, 512))[0]
    pooled = pipe.text_encoder(tokens(pipe.text_encoder, 77)).pooler_output
    lap("encode")
    last = {}

    def after_step(_pipe: Any, index: int, _timestep: Any, values: dict) -> dict:
        if index == steps - 1:
            lap("steps")
        last.update(values)
        return values

    image = pipe(
        prompt_embeds=embeds.to(torch.bfloat16), pooled_prompt_embeds=pooled.to(torch.bfloat16), height=size,
        width=size, num_inference_steps=steps, guidance_scale=3.5, generator=torch.Generator("cpu").manual_seed(7),
        callback_on_step_end=after_step,
    ).images[0]  # fmt: skip
    lap("decode")
    return laps, image


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row of one method."""
    device, cuda = options.device, options.device != "cpu"
    row: dict[str, Any] = {"variant": options.method, "gib": options.gib, "steps": options.steps, "size": options.size}
    began = time.perf_counter()
    total = torch.cuda.get_device_properties(device).total_memory if cuda else 1
    if cuda and options.method == "ours":  # what is offloaded is only made on the device
        torch.cuda.set_per_process_memory_fraction(options.gib * GIB / total, device)
    pipe = pipeline(options.method, device, TINY if options.tiny else FULL)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(options.gib * GIB / total, device)
    settle(pipe, options.method, device, options.gib)
    row["setup_s"] = time.perf_counter() - began
    picture(pipe, device, options.size, 1)
    if options.method in ("ours", "room"):  # the second call of a shape is recorded
        picture(pipe, device, options.size, 1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    laps, _ = picture(pipe, device, options.size, options.steps)
    row |= {"seconds": sum(laps.values()), "stages": laps, "step_s": laps["steps"] / options.steps}
    if cuda:
        row |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "held_gib": torch.cuda.max_memory_reserved() / GIB}
    return row


def main() -> None:
    """Parse the command line, measure, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--gib", type=float, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small random parts, for trials")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    try:
        row = measure(options)
    except (RuntimeError, ValueError) as error:  # torch.OutOfMemoryError is one of the first
        row = {"variant": options.method, "gib": options.gib, "error": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(row), flush=True)
    if options.json:
        write_json(options.json, machine(torch.device(options.device)) | {"rows": [row]})


if __name__ == "__main__":
    main()
