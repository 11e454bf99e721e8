"""FLUX.1 in nunchaku's layout: which stored layer holds which diffusers linears."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from engine.checkpoint.awq import AwqPiece
from engine.checkpoint.linears import Part, SvdqPiece
from engine.checkpoint.pieces import Copy, Piece

__all__ = ["BLOCKS", "config_of", "dense_pieces", "pieces"]

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def pieces(config: Mapping[str, Any], precision: str, rank: int) -> list[Piece]:
    """All layers of a FluxTransformer2DModel with this diffusers `config`, in the order the model runs them."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    head = config["attention_head_dim"]
    if width % 128:
        raise ValueError(f"FLUX of width {width}: 4-bit layers need a multiple of 128")
    layers: list[Piece] = []
    for index in range(config["num_layers"]):
        layers += _double(f"transformer_blocks.{index}", width, head, precision, rank)
    for index in range(config["num_single_layers"]):
        layers += _single(f"single_transformer_blocks.{index}", width, head, precision, rank)
    return layers + dense_pieces(config)


def config_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The diffusers config of a file without one, from the shapes of its stored tensors.

    Raises KeyError or IndexError when a tensor that tells a size is not there.
    """
    head = next(shape[0] for name, shape in shapes.items() if name.endswith(".norm_q.weight"))
    width, channels = shapes["x_embedder.weight"]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _count(shapes, BLOCKS[0]),
        "num_single_layers": _count(shapes, BLOCKS[1]),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        # An eighth of a head's channels turns with the picture's index, the others with row and column.
        "axes_dims_rope": [head // 8, head // 16 * 7, head // 16 * 7],
    }


def _count(names: Iterable[str], start: str) -> int:
    return len({name.split(".")[1] for name in names if name.startswith(start)})


def dense_pieces(config: Mapping[str, Any]) -> list[Piece]:
    """The layers outside the blocks, which stay in 16 bits under their diffusers names."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = config["in_channels"]
    out = config.get("patch_size", 1) ** 2 * (config.get("out_channels") or channels)
    shapes = {
        "x_embedder": (width, channels),
        "context_embedder": (width, config["joint_attention_dim"]),
        "norm_out.linear": (2 * width, width),
        "proj_out": (out, width),
    }
    embedders = {"timestep": 256, "text": config["pooled_projection_dim"]}
    if config.get("guidance_embeds"):
        embedders["guidance"] = 256
    for name, size in embedders.items():
        shapes[f"time_text_embed.{name}_embedder.linear_1"] = (width, size)
        shapes[f"time_text_embed.{name}_embedder.linear_2"] = (width, width)
    copies: list[Piece] = []
    for name, (n, k) in shapes.items():
        copies += [_same(f"{name}.weight", (n, k)), _same(f"{name}.bias", (n,))]
    return copies


def _double(block: str, width: int, head: int, precision: str, rank: int) -> list[Piece]:
    def linear(prefix: str, names: tuple[str, ...], n: int, k: int, gelu: bool = False) -> SvdqPiece:
        return _linear(block, prefix, names, n, k, precision, rank, gelu)

    image = tuple(f"attn.to_{part}" for part in "qkv")
    text = tuple(f"attn.add_{part}_proj" for part in "qkv")
    norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    return [
        AwqPiece(f"{block}.norm1.linear", f"{block}.norm1.linear", 6 * width, width, chunks=6),
        AwqPiece(f"{block}.norm1_context.linear", f"{block}.norm1_context.linear", 6 * width, width, chunks=6),
        linear("qkv_proj", image, width, width),
        linear("qkv_proj_context", text, width, width),
        linear("out_proj", ("attn.to_out.0",), width, width),
        linear("out_proj_context", ("attn.to_add_out",), width, width),
        linear("mlp_fc1", ("ff.net.0.proj",), 4 * width, width),
        linear("mlp_fc2", ("ff.net.2",), width, 4 * width, gelu=True),
        linear("mlp_context_fc1", ("ff_context.net.0.proj",), 4 * width, width),
        linear("mlp_context_fc2", ("ff_context.net.2",), width, 4 * width, gelu=True),
        *(Copy(f"{block}.{norm}.weight", f"{block}.attn.{norm}.weight", (head,)) for norm in norms),
    ]


def _single(block: str, width: int, head: int, precision: str, rank: int) -> list[Piece]:
    def linear(prefix: str, names: tuple[str, ...], n: int, k: int, gelu: bool = False) -> SvdqPiece:
        return _linear(block, prefix, names, n, k, precision, rank, gelu)

    attention = Part(f"{block}.proj_out.attn", slice(0, width), bias="maybe")
    return [
        AwqPiece(f"{block}.norm.linear", f"{block}.norm.linear", 3 * width, width, chunks=3),
        linear("qkv_proj", tuple(f"attn.to_{part}" for part in "qkv"), width, width),
        linear("mlp_fc1", ("proj_mlp",), 4 * width, width),
        SvdqPiece(f"{block}.out_proj", (attention,), width, width, precision, rank),
        linear("mlp_fc2", ("proj_out.mlp",), width, 4 * width, gelu=True),
        *(Copy(f"{block}.{norm}.weight", f"{block}.attn.{norm}.weight", (head,)) for norm in ("norm_q", "norm_k")),
    ]


def _linear(
    block: str, prefix: str, names: tuple[str, ...], n: int, k: int, precision: str, rank: int, gelu: bool
) -> SvdqPiece:
    """`n` is the rows of each of `names`, stacked in order; `gelu` marks a linear that reads GELU outputs."""
    parts = tuple(Part(f"{block}.{name}", slice(i * n, (i + 1) * n)) for i, name in enumerate(names))
    # Only the int4 kernels shift and quantize without a sign; nvfp4 has one in every code.
    shifted = gelu and precision == "int4"
    return SvdqPiece(f"{block}.{prefix}", parts, n * len(names), k, precision, rank, shifted=shifted)


def _same(name: str, shape: tuple[int, ...]) -> Copy:
    return Copy(name, name, shape)
