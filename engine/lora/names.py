"""LoRA key names: taking a key apart, and BFL's module names in diffusers' terms."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Key", "is_foreign", "module_of", "parse"]

# Spellings of the two factors; "down" reads the input (r, K), "up" writes the output (N, r).
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".lora_B.bias": "bias",
    ".lora_up.bias": "bias",
    ".alpha": "alpha",
    ".query_norm.scale": "query_norm",
    ".key_norm.scale": "key_norm",
}
# PEFT puts an adapter's name between a factor's and "weight".
_ADAPTER = re.compile(r"\.lora_([AB])\.[^.]+\.(weight|bias)$")
# Control LoRAs replace the weights of these; diffusers' form of them keeps the layers' own names.
_NORM = re.compile(r"\.attn\.norm_(added_)?[qk]\.weight$")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
# Text encoders have LoRAs of their own, and some trainers save what is no low-rank delta of the transformer.
_FOREIGN_STARTS = ("lora_te", "text_encoder", "te1.", "te2.", "clip_l.", "t5xxl.")
_FOREIGN_ENDS = (".diff_b", ".diff")
_FOREIGN_PARTS = ("position_embedding", "text_projection")

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.norm": ("attn.norm_q", "attn.norm_k"),
    "txt_attn.norm": ("attn.norm_added_q", "attn.norm_added_k"),
    # XLabs keeps its LoRAs in attention processors: 1 is the image stream, 2 the text stream.
    "processor.qkv_lora1": _QKV,
    "processor.qkv_lora2": _ADDED,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.proj_lora2": ("attn.to_add_out",),
}
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
    "norm": ("attn.norm_q", "attn.norm_k"),
    "processor.qkv_lora": _QKV,
    "processor.proj_lora": ("proj_out",),
}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# diffusers' own leaves, for undoing the flattening of dots to underscores.
_LEAVES = (
    *(leaf for leaves in (*_DOUBLE.values(), *_SINGLE.values()) for leaf in leaves),
    *(f"attn{number}.{leaf}" for number in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.conv_inverted",
    "ff.conv_point",
)
_TOPS = (
    *_TOP,
    *_TOP.values(),
    "time_embed.linear",
    "time_embed.emb.timestep_embedder.linear_1",
    "time_embed.emb.timestep_embedder.linear_2",
    "caption_projection.linear_1",
    "caption_projection.linear_2",
)
_BLOCK = re.compile(r"(double_blocks|single_blocks|single_transformer_blocks|transformer_blocks)[._](\d+)[._](.+)")
_BY_FLAT_LEAF = {leaf.replace(".", "_"): leaf for leaf in (*_DOUBLE, *_SINGLE, *_LEAVES)}
_BY_FLAT_TOP = {top.replace(".", "_"): top for top in _TOPS}


@dataclass(frozen=True)
class Key:
    """A key taken apart: module path as the file spells it (dots restored) and what the tensor is."""

    module: str
    part: str


def is_foreign(key: str) -> bool:
    """Whether a tensor is not for the transformer, or no low-rank delta; such ones are left out and listed."""
    starts, ends = key.startswith(_FOREIGN_STARTS), key.endswith(_FOREIGN_ENDS)
    return starts or ends or any(part in key for part in _FOREIGN_PARTS)


def parse(key: str) -> Key | None:
    """Take a key apart; None when its ending is not one of a LoRA's."""
    if _NORM.search(key):
        return Key(_module(key.removesuffix(".weight")), "norm")
    key = _ADAPTER.sub(r".lora_\1.\2", key)
    for suffix, part in _SUFFIXES.items():
        if key.endswith(suffix):
            return Key(_module(key.removesuffix(suffix)), part)
    return None


def module_of(module: str) -> tuple[tuple[str, ...], bool]:
    """diffusers modules whose rows a (possibly BFL) module stacks, and whether its two row halves are swapped."""
    if module in _TOP:
        return (_TOP[module],), module == "final_layer.adaLN_modulation.1"
    match = _BLOCK.fullmatch(module)
    if match is None:
        return (module,), False
    kind, index, leaf = match.groups()
    if kind == "double_blocks":
        return tuple(f"transformer_blocks.{index}.{name}" for name in _DOUBLE.get(leaf, (leaf,))), False
    if kind == "single_blocks":
        return tuple(f"single_transformer_blocks.{index}.{name}" for name in _SINGLE.get(leaf, (leaf,))), False
    return (module,), False


def _module(name: str) -> str:
    for prefix in _FLAT:
        if name.startswith(prefix):
            return _unflatten(name.removeprefix(prefix))
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _unflatten(name: str) -> str:
    """Give a module path its dots back; unknown names stay as they are, and then match nothing."""
    if name in _BY_FLAT_TOP:
        return _BY_FLAT_TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    kind, index, leaf = match.groups()
    return f"{kind}.{index}.{_BY_FLAT_LEAF.get(leaf, leaf)}"
