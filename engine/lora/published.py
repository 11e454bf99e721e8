"""nunchaku's runtime form of a LoRA: the checkpoint's own low-rank factors with the LoRA's beside them, packed.

Modulations are stored unpacked with interleaved rows, layers outside the blocks under their PEFT names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from engine.checkpoint import packing
from engine.checkpoint.awq import AwqPiece
from engine.checkpoint.linears import SvdqPiece
from engine.checkpoint.nunchaku import pieces_for
from engine.checkpoint.packing import pad, round_up
from engine.checkpoint.pieces import Piece
from engine.checkpoint.quantization import read_quantization
from engine.checkpoint.source import Source
from engine.errors import CheckpointError
from engine.lora.fuse import FUSED, add_ranks, pad_rank, part_factors, stack_rows
from engine.lora.weights import Factors, LoraWeights

__all__ = ["from_runtime", "to_runtime"]

# The kernels that run an MLP in one go use one buffer for both low-rank activations.
_PAIRS = {"mlp_fc1": "mlp_fc2", "mlp_context_fc1": "mlp_context_fc2"}


def to_runtime(lora: LoraWeights, source: Source) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors of the runtime form of `lora` for the checkpoint `source`, and the modules of it that match nothing.

    Raises CheckpointError when shapes differ or the checkpoint has no such layout.
    """
    pieces = _pieces(source)
    used: set[str] = set()
    layers = {piece.prefix: _w4a4(piece, lora, source, used) for piece in pieces if isinstance(piece, SvdqPiece)}
    found = {prefix: factors for prefix, factors in layers.items() if factors is not None}
    _equalize(found, {piece.prefix: piece for piece in pieces if isinstance(piece, SvdqPiece)}, source)
    tensors: dict[str, Tensor] = {}
    for piece in pieces:
        if isinstance(piece, SvdqPiece):
            if piece.prefix in found:
                tensors |= _packed(piece, found[piece.prefix])
            tensors |= _bias(piece, lora, source, used)
        elif isinstance(piece, AwqPiece):
            tensors |= _modulation(piece, lora, source, used)
    outside = {name for piece in pieces if not isinstance(piece, SvdqPiece | AwqPiece) for name in piece.canonical()}
    inside = frozenset(used)
    for key, tensor in lora.tensors(prefix="").items():
        module = key.rpartition(".lora_")[0] or key.removesuffix(".weight")
        if module not in inside and f"{module}.weight" in outside:
            used.add(module)
            tensors[key] = tensor
    return tensors, [module for module in lora.modules if not _is_used(module, used)]


def from_runtime(tensors: Mapping[str, Tensor], source: Source) -> LoraWeights:
    """The LoRA inside a runtime-form file made for the checkpoint `source`.

    Raises CheckpointError when the factors it starts with are not those of the checkpoint.
    """
    lora, known = LoraWeights(), set()
    for piece in _pieces(source):
        if not isinstance(piece, SvdqPiece | AwqPiece):
            continue
        names = {part: f"{piece.prefix}.{part}" for part in ("lora_down", "lora_up")}
        if names["lora_down"] not in tensors or names["lora_up"] not in tensors:
            continue
        known |= set(names.values())
        down, up = (tensors[name] for name in names.values())
        if isinstance(piece, AwqPiece):
            rows = up.view(-1, piece.chunks, up.shape[1]).transpose(0, 1).reshape(up.shape)
            lora.factors[piece.name] = Factors(down, rows)
        else:
            _unpacked(piece, packing.unpack_lora_down(down), packing.unpack_lora_up(up), source, lora)
    for key in sorted(set(tensors) - known):
        module, _, kind = key.rpartition(".lora_")
        if kind == "A.weight" and f"{module}.lora_B.weight" in tensors:
            lora.factors[module] = Factors(tensors[key], tensors[f"{module}.lora_B.weight"])
        elif kind != "B.weight":
            lora.left_out.append(key)
    return lora


def _pieces(source: Source) -> list[Piece]:
    details = read_quantization(source)
    return pieces_for(details.model_class, details.config, details.weight, details.rank, list(source))


def _w4a4(piece: SvdqPiece, lora: LoraWeights, source: Source, used: set[str]) -> Factors | None:
    parts = [part_factors(lora, part.name, part.n, piece.width) for part in piece.parts]
    if all(part is None for part in parts):
        return None
    used.update(part.name for part in piece.parts)
    stacked = _stored_rows(piece, parts)
    base = _base(piece, source)
    if base is None:
        return stacked
    kind = base.down.dtype
    return add_ranks([base, Factors(stacked.down.to(kind), stacked.up.to(kind))])


def _stored_rows(piece: SvdqPiece, parts: list[Factors | None]) -> Factors:
    """Stack the parts' factors and put the rows where the layout stores them."""
    stacked = stack_rows(parts, [part.n for part in piece.parts])
    if stacked is None:
        raise CheckpointError(f"{piece.prefix}: no factors")  # callers checked
    order = torch.cat([_indices(part.rows) for part in piece.parts])
    up = stacked.up.new_zeros((piece.n, stacked.up.shape[1]))
    up[order] = stacked.up
    return Factors(stacked.down, up)


def _indices(rows: slice | Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def _base(piece: SvdqPiece, source: Source) -> Factors | None:
    if not piece.rank:
        return None
    up = source[f"{piece.parts[0].name}.lora_up"].new_zeros((piece.n, piece.rank))
    for part in piece.parts:
        up[part.rows] = source[f"{part.name}.lora_up"]
    return Factors(source[f"{piece.parts[0].name}.lora_down"], up)


def _equalize(found: dict[str, Factors], pieces: Mapping[str, SvdqPiece], source: Source) -> None:
    for first, second in _mlp_pairs(pieces):
        if first not in found and second not in found:
            continue
        for prefix in (first, second):
            if prefix not in found and (base := _base(pieces[prefix], source)) is not None:
                found[prefix] = base
        if first in found and second in found:
            rank = max(pad_rank(found[prefix]).down.shape[0] for prefix in (first, second))
            found |= {prefix: pad_rank(found[prefix], rank) for prefix in (first, second)}


def _mlp_pairs(pieces: Mapping[str, SvdqPiece]) -> Iterator[tuple[str, str]]:
    for prefix in pieces:
        block, _, leaf = prefix.rpartition(".")
        if leaf in _PAIRS:
            yield prefix, f"{block}.{_PAIRS[leaf]}"


def _packed(piece: SvdqPiece, factors: Factors) -> dict[str, Tensor]:
    down, up = pad_rank(factors)
    rank = down.shape[0]
    return {
        f"{piece.prefix}.lora_down": packing.pack_lora_down(pad(down.contiguous(), (rank, round_up(piece.k)))),
        f"{piece.prefix}.lora_up": packing.pack_lora_up(pad(up.contiguous(), (round_up(piece.n), rank))),
    }


def _bias(piece: SvdqPiece, lora: LoraWeights, source: Source, used: set[str]) -> dict[str, Tensor]:
    deltas = {}
    for part in piece.parts:
        # proj_out's delta goes to its attention half, where the stored bias is zero.
        name = part.name.removesuffix(".attn") if part.name.endswith(".proj_out.attn") else part.name
        if name in lora.biases:
            deltas[part] = lora.biases[name]
            used.add(part.name)
    if not deltas:
        return {}
    names = (*piece.canonical(), *piece.optional())
    stored = piece.encode({name: source[name] for name in names if name in source})[f"{piece.prefix}.bias"]
    plain = packing.unpack_vector(stored).float()
    for part, delta in deltas.items():
        plain[: piece.n][part.rows] += delta.float()
    return {f"{piece.prefix}.bias": packing.pack_vector(plain.to(stored.dtype))}


def _modulation(piece: AwqPiece, lora: LoraWeights, source: Source, used: set[str]) -> dict[str, Tensor]:
    found = part_factors(lora, piece.name, piece.n, piece.k)
    if found is None:
        return {}
    used.add(piece.name)
    kind = source[f"{piece.name}.scales"].dtype
    down, up = (value.to(kind) for value in pad_rank(found))
    rows = up.view(piece.chunks, -1, up.shape[1]).transpose(0, 1).reshape(up.shape)
    return {f"{piece.prefix}.lora_down": down.contiguous(), f"{piece.prefix}.lora_up": rows.contiguous()}


def _unpacked(piece: SvdqPiece, down: Tensor, up: Tensor, source: Source, lora: LoraWeights) -> None:
    base = _base(piece, source)
    rank = 0 if base is None else base.down.shape[0]
    down, up = down[:, : piece.width], up[: piece.n]
    if base is not None and not (torch.equal(down[:rank], base.down) and torch.equal(up[:, :rank], base.up)):
        raise CheckpointError(f"{piece.prefix}: this LoRA was converted for another checkpoint; convert it again")
    if down.shape[0] == rank:
        return
    for part in piece.parts:
        lora.factors[part.name] = Factors(down[rank:], up[:, rank:][part.rows])


def _is_used(module: str, used: set[str]) -> bool:
    if module in used or f"{module}.attn" in used:
        return True
    return any(
        module.endswith(f".{fused}") and module.removesuffix(fused) + leaves[0] in used
        for fused, leaves in FUSED.items()
    )
