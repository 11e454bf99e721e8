"""Open and write checkpoints in nunchaku's layout: one file with metadata, or the older folder of two files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.checkpoint import exact, nunchaku_flux, nunchaku_sana
from engine.checkpoint.files import TensorFiles
from engine.checkpoint.linears import GROUPS
from engine.checkpoint.pieces import Piece
from engine.checkpoint.quantization import Quantization, check_sizes
from engine.checkpoint.source import PublishedSource
from engine.errors import CheckpointError

__all__ = ["CLASSES", "LAYOUT", "LEGACY_BLOCKS", "LEGACY_REST", "metadata", "open_source", "pieces_for"]

LAYOUT = "nunchaku"
LEGACY_BLOCKS = "transformer_blocks.safetensors"
LEGACY_REST = "unquantized_layers.safetensors"
# diffusers class -> the class its published files name.
CLASSES: Mapping[str, str] = {
    "FluxTransformer2DModel": "NunchakuFluxTransformer2dModel",
    "SanaTransformer2DModel": "NunchakuSanaTransformer2DModel",
}
_ACTIVATION = {"int4": "int4", "nvfp4": "fp4_e2m1_all"}
_DEFAULT_RANK = 32
_MAX_SIZE = 2**20
_SIZES = ("_dim", "_heads", "_channels", "_layers", "patch_size")
_PAG_LAYER = re.compile(r"(?:^|\.)transformer_blocks\.(\d{1,4})\.\w+\.pag_to_v\.")


def open_source(files: TensorFiles, model_class: str) -> PublishedSource:
    """The canonical view of a single file or a legacy folder holding a `model_class` (diffusers name).

    Raises CheckpointError when metadata, names, shapes or dtypes do not fit, with what does not.
    """
    _check_class(files, model_class)
    config = _config(files, model_class)
    check_sizes(files.path, config, len(files))
    scales = (name for name in files if name.endswith(".wscales"))
    precision = "nvfp4" if any(files.dtype(name) == "F8_E4M3" for name in scales) else "int4"
    rank = _rank(files)
    try:
        layers = pieces_for(model_class, config, precision, rank, list(files))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{files.path}: its model config is incomplete or damaged ({error!r})") from error
    details = Quantization(model_class, config, precision, GROUPS[precision], rank)
    canonical = details.metadata()
    if comfy := _comfy_config_of(files):
        canonical["comfy_config"] = comfy
    return PublishedSource(files, layers, canonical, LAYOUT, exact.read(files))


def pieces_for(
    model_class: str, config: Mapping[str, Any], precision: str, rank: int, names: Sequence[str]
) -> list[Piece]:
    """Pieces of a model; `names` (stored or canonical) tell which SANA layers carry a PAG projection."""
    _check_sizes(config)
    if model_class == "FluxTransformer2DModel":
        return nunchaku_flux.pieces(config, precision, rank)
    if model_class == "SanaTransformer2DModel":
        pag = {int(found[1]) for name in names if (found := _PAG_LAYER.search(name)) is not None}
        return nunchaku_sana.pieces(config, precision, rank, sorted(pag))
    raise CheckpointError(f"{model_class}: nunchaku's layout is known for {' and '.join(CLASSES)} only")


def metadata(details: Quantization, comfy_config: str | None = None) -> dict[str, str]:
    """Metadata of a published single file; `comfy_config` is that of the file it came from, if any."""
    weight = _ACTIVATION[details.weight]
    nvfp4 = details.weight == "nvfp4"
    quantization = {
        "method": "svdquant",
        "weight": {
            "dtype": weight,
            "scale_dtype": [None, "fp8_e4m3_nan"] if nvfp4 else None,
            "group_size": details.group_size,
        },
        "activation": {
            "dtype": weight,
            "scale_dtype": "fp8_e4m3_nan" if nvfp4 else None,
            "group_size": details.group_size,
        },
        "rank": details.rank,
    }
    config = {"_class_name": details.model_class, **details.config}
    comfy = comfy_config or json.dumps(_comfy_config(details), indent=2)
    return {
        "config": json.dumps(config, indent=2),
        "comfy_config": comfy,
        "model_class": CLASSES[details.model_class],
        "quantization_config": json.dumps(quantization),
    }


def _comfy_config_of(files: TensorFiles) -> str | None:
    """What the checkpoint tells ComfyUI, word for word."""
    beside = files.path / "comfy_config.json"
    if not beside.is_file():
        return files.metadata.get("comfy_config")
    return beside.read_text(encoding="utf-8", errors="replace").rstrip("\n")


def _comfy_config(details: Quantization) -> dict[str, Any]:
    """What ComfyUI reads to build its own FLUX; empty for other models."""
    config = details.config
    if details.model_class != "FluxTransformer2DModel":
        return {}
    guidance = bool(config.get("guidance_embeds"))
    return {
        "model_class": "Flux" if guidance else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config.get("axes_dims_rope", (16, 56, 56))),
            "context_in_dim": config["joint_attention_dim"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "disable_unet_model_creation": True,
            "guidance_embed": guidance,
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "image_model": "flux",
            "in_channels": config["in_channels"] // 4,
            "mlp_ratio": 4.0,
            "num_heads": config["num_attention_heads"],
            "out_channels": (config.get("out_channels") or config["in_channels"]) // 4,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config["pooled_projection_dim"],
        },
    }


def _check_class(files: TensorFiles, model_class: str) -> None:
    named = files.metadata.get("model_class")
    own = CLASSES[model_class]
    if named not in (None, model_class, own, own.replace("2dModel", "2DModelV2")):
        raise CheckpointError(f"{files.path}: made for {named}, but its tensors are those of {model_class}")


def _config(files: TensorFiles, model_class: str) -> dict[str, Any]:
    text = files.metadata.get("config")
    if text is None:
        file = files.path / "config.json" if files.path.is_dir() else None
        if file is None or not file.is_file():
            return _config_from_shapes(files, model_class)
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{files.path}: its model config is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{files.path}: its model config is not a JSON object")
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}


def _config_from_shapes(files: TensorFiles, model_class: str) -> dict[str, Any]:
    """FLUX.1's sizes all show in its tensors; SANA's attention heads do not."""
    try:
        if model_class == "FluxTransformer2DModel":
            return nunchaku_flux.config_of({name: files.shape(name) for name in files})
    except (KeyError, IndexError, ZeroDivisionError):
        pass
    raise CheckpointError(
        f"{files.path}: no model config: a single file carries it in its metadata, a folder in config.json"
    )


def _rank(files: TensorFiles) -> int:
    """The rank that the metadata states, else that of the first low-rank factor; 0 without any."""
    downs = sorted(name for name in files if name.endswith(".lora_down"))
    stated = None
    if "quantization_config" in files.metadata:
        try:
            stated = json.loads(files.metadata["quantization_config"]).get("rank")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{files.path}: its quantization_config is damaged ({error})") from error
    if stated is not None and (not isinstance(stated, int) or not 0 <= stated <= 1024 or stated % 16):
        raise CheckpointError(f"{files.path}: expected a rank that is a multiple of 16 up to 1024, got {stated!r}")
    if not downs:
        return stated or 0
    shape = files.shape(downs[0])
    found = shape[1] if len(shape) == 2 else _DEFAULT_RANK
    rank = found if stated is None else stated
    if rank % 16 or rank > 1024:
        raise CheckpointError(f"{files.path}: expected a rank that is a multiple of 16 up to 1024, got {rank}")
    return rank


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse layer counts and widths that no model has, before lists of that length are built."""
    for key, value in config.items():
        if key.startswith("num_") and not (isinstance(value, int) and 0 <= value <= 4096):
            raise ValueError(f"{key} = {value!r}")
        if isinstance(value, int | float) and not abs(value) <= _MAX_SIZE:
            raise ValueError(f"{key} = {value!r}")
        # Some arithmetic with sizes would work on texts and lists too.
        if key.endswith(_SIZES) and not (value is None or isinstance(value, int)):
            raise ValueError(f"{key} = {value!r}")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if width % 32 or not 0 < width * max(1, config.get("mlp_ratio") or 1) <= _MAX_SIZE:
        raise ValueError(f"num_attention_heads * attention_head_dim = {width}")
