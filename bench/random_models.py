"""Models of full size with random weights, for benches: the time of a step does not depend on weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

__all__ = ["CONFIG", "dense", "quantized", "random_layer", "random_nvfp4", "randomly_dense", "randomly_quantized"]

# FLUX.1-dev's transformer.
CONFIG: dict[str, Any] = dict(
    patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
    joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
)  # fmt: skip


def dense(device: str, config: dict) -> nn.Module:
    """The 16-bit transformer with random weights, made on the device."""
    from diffusers import FluxTransformer2DModel

    return randomly_dense(FluxTransformer2DModel, device, config)


def randomly_dense(model_class: Any, device: str, config: dict) -> nn.Module:
    """A 16-bit model of any class, made on the device."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(**config)
    finally:
        torch.set_default_dtype(torch.float32)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def random_layer(n: int, k: int, kind: str, rank: int, bias: bool, device: str, generator: torch.Generator) -> Any:
    """A quantized linear whose weights have the size of trained ones: about 0.02 each."""
    from engine import ops

    draw: dict[str, Any] = dict(generator=generator, device=device)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **draw)
    added = torch.randn(n, **draw).bfloat16() * 0.02 if bias else None
    if kind == "awq":
        scales = torch.full((n, k // 64), 0.005, dtype=torch.bfloat16, device=device)
        return ops.AwqWeight(codes=codes, scales=scales, zeros=-8 * scales, bias=added)
    # -8 is a code that quantizers do not write.
    low, high = codes & 15, codes >> 4
    codes = torch.where(low == 8, 9, low) | (torch.where(high == 8, 9, high) << 4)
    return ops.CanonicalLinear(
        codes=codes.to(torch.uint8),
        wscales=(torch.rand(n, k // 64, **draw) * 0.004 + 0.003).bfloat16(),
        smooth=(torch.rand(k, **draw) + 0.5).bfloat16(),
        lora_down=(torch.randn(rank, k, **draw) * 0.02).bfloat16() if rank else None,
        lora_up=(torch.randn(n, rank, **draw) * 0.02).bfloat16() if rank else None,
        bias=added,
    )


def quantized(device: str, config: dict, activation: str, rank: int, layer: Any = random_layer) -> nn.Module:
    """The 4-bit transformer with random weights; no 16-bit copy of it ever exists."""
    from diffusers import FluxTransformer2DModel

    from engine.models import flux

    return randomly_quantized(FluxTransformer2DModel, flux, device, config, activation, rank, layer)


def random_nvfp4(n: int, k: int, kind: str, rank: int, bias: bool, device: str, generator: torch.Generator) -> Any:
    """random_layer with NVFP4 in place of INT4."""
    layer = random_layer(n, k, kind, rank, bias, device, generator)
    if kind == "awq":
        return layer
    draw: dict[str, Any] = dict(generator=generator, device=device)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **draw)
    wscales = (torch.rand(n, k // 16, **draw) * 200 + 100).to(torch.float8_e4m3fn)
    return replace(layer, codes=codes, wscales=wscales, wtscale=torch.full((1,), 4e-5, device=device))


def randomly_quantized(
    model_class: Any, family: Any, device: str, config: dict, activation: str, rank: int, layer: Any = random_layer
) -> nn.Module:
    """A model of any family (engine.models.flux is one) whose leaves are random 4-bit layers."""
    from engine import ops
    from engine.linear import resolve_activation
    from engine.models.install import install
    from engine.models.plan import get_linear

    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    with torch.device("meta"):
        model = family.prepare(model_class(**config))
    backend, generator = ops.backends.select(where).name, torch.Generator(where).manual_seed(0)
    for group in family.plan(model):
        layers = {}
        shared = None
        for name in group.names:
            linear = get_linear(model, name)
            inputs = -(-linear.in_features // 64) * 64  # whole groups, as engine.models.install pads them
            made = layer(linear.out_features, inputs, group.kind, rank, linear.bias is not None, device, generator)
            if group.kind == "svdq":
                shared = shared or made
                made = ops.CanonicalLinear(**vars(made) | {"smooth": shared.smooth, "lora_down": shared.lora_down})
            layers[name] = made
        install(model, group, layers, backend=backend, activation=resolve_activation(activation, where),
                dtype=torch.bfloat16)  # fmt: skip
    family.fuse(model)
    rest = {name: torch.randn(p.shape, generator=generator, device=where, dtype=torch.bfloat16) * 0.02
            for name, p in model.state_dict().items() if p.is_meta}  # fmt: skip
    model.load_state_dict(rest, strict=False, assign=True)
    return model.eval().requires_grad_(False)
