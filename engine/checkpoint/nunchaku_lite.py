"""The diffusers "nunchaku_lite" folder: a diffusers model folder whose config lists the 4-bit modules by path.

Packing is nunchaku's. What differs: module paths are those of the unmodified diffusers model, nothing is fused or
padded, activations always have a sign (plain biases), and modulations keep diffusers' row order without a 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import exact
from engine.checkpoint.awq import AwqPiece
from engine.checkpoint.files import TensorFiles
from engine.checkpoint.linears import GROUPS, Part, SvdqPiece
from engine.checkpoint.lite_linears import LITE_NAMES, DenseProjOutPiece, LiteSvdqPiece, ProjOutPiece
from engine.checkpoint.pieces import Copy, Piece, same_bits
from engine.checkpoint.quantization import RECORDS, Quantization
from engine.checkpoint.source import PublishedSource, Source
from engine.errors import CheckpointError

__all__ = ["FILE", "METHOD", "config_of", "open_source", "pieces_for", "read_config"]

METHOD = "nunchaku_lite"
FILE = "diffusion_pytorch_model.safetensors"
# Written by us alone: the low-rank size before proj_out's two branches were put side by side.
RANK_KEY = "nibble_rank"
_FLUX = "FluxTransformer2DModel"
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json of a nunchaku_lite folder, None for anything else."""
    file = path / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return config if isinstance(section, dict) and section.get("quant_method") == METHOD else None


def open_source(files: TensorFiles) -> PublishedSource:
    """The canonical view of a nunchaku_lite folder; raises CheckpointError when config and tensors do not fit."""
    config = read_config(files.path)
    if config is None:
        raise CheckpointError(f"{files.path}: config.json has no quantization_config of method {METHOD!r}")
    model_class = str(config.get("_class_name", ""))
    svdq, awq = _section(files, config, "svdq_w4a4"), _section(files, config, "awq_w4a16")
    if not svdq and not awq:
        raise CheckpointError(f"{files.path}: its quantization_config lists no 4-bit modules")
    if both := set(_targets(svdq)) & set(_targets(awq)):
        raise CheckpointError(f"{files.path}: {min(both)} is listed both as svdq_w4a4 and as awq_w4a16")
    precision, stored_rank = str(svdq.get("precision", "int4")), int(svdq.get("rank", 0))
    rank = _own_rank(files, stored_rank)
    layers = _read_pieces(files, model_class, svdq, awq, precision, rank, stored_rank)
    plain = {key: value for key, value in config.items() if not key.startswith("_") and key != "quantization_config"}
    details = Quantization(
        model_class, plain, precision, GROUPS[precision], rank, _kept(files), shared_inputs=_share(files, svdq)
    )
    return PublishedSource(files, layers, details.metadata(), METHOD, exact.read(files))


def pieces_for(source: Source, details: Quantization) -> list[Piece]:
    """Pieces to write a canonical checkpoint with; raises CheckpointError for sizes the layout cannot hold."""
    layers: list[Piece] = []
    covered: set[str] = set()
    linears = {name.removesuffix(".codes") for name in source if name.endswith(".codes")}
    split = {name.removesuffix(".attn") for name in linears if name.endswith(".proj_out.attn")}
    of: dict[str, set[str]] = {}
    for other in source:
        of.setdefault(other.rpartition(".")[0], set()).add(other)
    stored_rank = 2 * details.rank if any(_have_own_ups(source, name) for name in split) else details.rank
    for name in sorted(linears):
        n, k = source.shape(f"{name}.codes")[0], source.shape(f"{name}.codes")[1] * 2
        covered |= of[name]
        if f"{name}.zeros" in source:
            layers.append(AwqPiece(name, name, n, k, bias=f"{name}.bias" in source))
        elif name.rpartition(".")[0] not in split:
            layers.append(_lite(name, n, k, f"{name}.bias" in source, details.weight, details.rank, stored_rank))
    for name in sorted(split):
        width = source.shape(f"{name}.attn.codes")[0]
        layers.append(ProjOutPiece(name, width, details.weight, details.rank, stored_rank))
    for name in sorted(name.removesuffix(".attn.weight") for name in source if name.endswith(".proj_out.attn.weight")):
        piece = DenseProjOutPiece(name, source.shape(f"{name}.attn.weight")[0])
        layers.append(piece)
        covered |= piece.canonical().keys()
    for name in sorted(set(source) - covered):
        if not name.startswith(RECORDS) and ".pag_to_v." not in name:
            layers.append(Copy(name, name, source.shape(name)))
    return layers


def _have_own_ups(source: Source, name: str) -> bool:
    """Whether the halves of `proj_out` have low-rank branches of their own: halves of one branch share its rows."""
    ups = [f"{name}.{half}.lora_up" for half in ("attn", "mlp")]
    return all(up in source for up in ups) and not same_bits(source[ups[0]], source[ups[1]])


def config_of(details: Quantization, layers: Sequence[Piece], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a folder made of `layers`."""
    svdq = [piece for piece in layers if isinstance(piece, SvdqPiece | ProjOutPiece)]
    awq = [piece.prefix for piece in layers if isinstance(piece, AwqPiece)]
    section: dict[str, Any] = {"quant_method": METHOD, "compute_dtype": _DTYPES[dtype]}
    if svdq:
        section["svdq_w4a4"] = {
            "precision": details.weight,
            "group_size": GROUPS[details.weight],
            "rank": max(piece.stored_rank or piece.rank for piece in svdq),
            "targets": [piece.prefix for piece in svdq],
        }
    if awq:
        section["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": awq}
    return {"_class_name": details.model_class, **details.config, "quantization_config": section}


def _lite(name: str, n: int, k: int, bias: bool, precision: str, rank: int, stored_rank: int) -> LiteSvdqPiece:
    if n % 128 or k % 128:
        raise CheckpointError(
            f"{name}: {n} outputs and {k} inputs are not multiples of 128, but nunchaku_lite does not pad"
        )
    part = Part(name, slice(0, n), "yes" if bias else "no")
    return LiteSvdqPiece(name, (part,), n, k, precision, rank, padded=False, stored_rank=stored_rank, names=LITE_NAMES)


def _read_pieces(
    files: TensorFiles,
    model_class: str,
    svdq: Mapping[str, Any],
    awq: Mapping[str, Any],
    precision: str,
    rank: int,
    stored_rank: int,
) -> list[Piece]:
    layers: list[Piece] = []
    covered: set[str] = set()
    weight_only = set(_targets(awq))
    for name in dict.fromkeys([*_targets(svdq), *_targets(awq)]):
        weight = f"{name}.qweight"
        shape = files.shape(weight) if weight in files else ()
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(f"{files.path}: {name} is listed as 4-bit, but {weight} is missing or not a matrix")
        if name in weight_only:
            piece: Piece = AwqPiece(name, name, shape[0] * 4, shape[1] * 2, bias=f"{name}.bias" in files)
        elif model_class == _FLUX and name.startswith("single_") and name.endswith(".proj_out"):
            piece = ProjOutPiece(name, shape[0], precision, rank, stored_rank)
        else:
            piece = _lite(name, shape[0], shape[1] * 2, f"{name}.bias" in files, precision, rank, stored_rank)
        layers.append(piece)
        covered |= piece.stored().keys()
    for name in sorted(set(files) - covered):
        module, _, kind = name.rpartition(".")
        if model_class == _FLUX and module.startswith("single_") and module.endswith(".proj_out"):
            if kind == "weight":
                layers.append(DenseProjOutPiece(module, files.shape(name)[0]))
        else:
            layers.append(Copy(name, name, files.shape(name)))
    return layers


def _section(files: TensorFiles, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config["quantization_config"].get(name)
    if section is None:
        return {}
    allowed = {"svdq_w4a4": {"int4": 64, "nvfp4": 16}, "awq_w4a16": {"int4": 64}}[name]
    targets = section.get("targets") if isinstance(section, dict) else None
    if not isinstance(targets, list) or not targets or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{files.path}: {name}.targets: expected a non-empty list of module paths")
    precision = section.get("precision")
    if not isinstance(precision, str) or allowed.get(precision, 0) != section.get("group_size"):
        raise CheckpointError(
            f"{files.path}: {name}: expected one of {allowed} as precision and group_size, got"
            f" {section.get('precision')!r} and {section.get('group_size')!r}"
        )
    rank = section.get("rank", 0 if name == "awq_w4a16" else None)
    if not isinstance(rank, int) or not 0 <= rank <= 2048 or rank % 16:
        raise CheckpointError(f"{files.path}: {name}.rank: expected a multiple of 16, got {rank!r}")
    return section


def _targets(section: Mapping[str, Any]) -> list[str]:
    return list(section.get("targets", ()))


def _own_rank(files: TensorFiles, stored_rank: int) -> int:
    text = files.metadata.get(RANK_KEY)
    if text is None:
        return stored_rank
    if text != str(stored_rank // 2):
        raise CheckpointError(
            f"{files.path}: {RANK_KEY} is {text!r}, which does not fit a stored rank of {stored_rank}"
        )
    return stored_rank // 2


def _kept(files: TensorFiles) -> tuple[str, ...]:
    """Linears inside the blocks that stay in 16 bits."""
    inside = (name for name in files if name.endswith(".weight") and "transformer_blocks." in name)
    names = sorted(name.removesuffix(".weight") for name in inside if len(files.shape(name)) == 2)
    # In the canonical form a FLUX single block's proj_out is two linears.
    return tuple(f"{name}.*" if name.startswith("single_") and name.endswith(".proj_out") else name for name in names)


def _share(files: TensorFiles, svdq: Mapping[str, Any]) -> bool:
    """Whether q, k and v share smooth factor and down-projection everywhere, so that they can run as one."""
    for name in _targets(svdq):
        for first, others in (("to_q", ("to_k", "to_v")), ("add_q_proj", ("add_k_proj", "add_v_proj"))):
            if not name.endswith(f".{first}"):
                continue
            for other in others:
                twin = name.removesuffix(first) + other
                for part in ("smooth_factor", "proj_down"):
                    pair = [f"{module}.{part}" for module in (name, twin)]
                    if all(key in files for key in pair) and not torch.equal(files[pair[0]], files[pair[1]]):
                        return False
    return True
