"""nunchaku's runtime form of a LoRA: the checkpoint's own low-rank factors with the LoRA's beside them, packed.

Modulations are stored unpacked with interleaved rows, layers outside the blocks under their PEFT names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from engine.checkpoint import packing
from engine.checkpoint.awq import AwqPiece
from engine.checkpoint.folding import outputs, smooth_in_values
from engine.checkpoint.linears import SvdqPiece
from engine.checkpoint.nunchaku import pieces_for
from engine.checkpoint.packing import pad, round_up
from engine.checkpoint.pieces import Copy, Piece
from engine.checkpoint.quantization import read_quantization
from engine.checkpoint.source import Source
from engine.errors import CheckpointError
from engine.lora.folded import into_folded, out_of_folded
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
    lora = into_folded(lora, _folded(source))
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
            tensors |= _bias(piece, lora, source, used)
    copies = {
        name: piece for piece in pieces if not isinstance(piece, SvdqPiece | AwqPiece) for name in piece.canonical()
    }
    inside = frozenset(used)
    for key, tensor in lora.tensors(prefix="").items():
        module = key.rpartition(".lora_")[0] or key.removesuffix(".weight")
        if module not in inside and (piece := copies.get(f"{module}.weight")) is not None:
            used.add(module)
            if key == f"{module}.weight" and tuple(tensor.shape) != piece.canonical()[key]:
                raise CheckpointError(
                    f"{module} has {piece.canonical()[key][0]} weights, but its LoRA {tensor.numel()}"
                )
            # Norms have a place of their own in the blocks; other layers keep the names of their LoRA.
            tensors[piece.source if isinstance(piece, Copy) and key == piece.name else key] = tensor
    return tensors, [*(module for module in lora.modules if not _is_used(module, used)), *lora.unknown]


def from_runtime(tensors: Mapping[str, Tensor], source: Source) -> LoraWeights:
    """The LoRA inside a runtime-form file made for the checkpoint `source`.

    Raises CheckpointError when the factors it starts with are not those of the checkpoint.
    """
    lora, known = LoraWeights(), set()
    for piece in _pieces(source):
        if isinstance(piece, SvdqPiece | AwqPiece):
            known |= _layer(piece, tensors, source, lora)
        elif isinstance(piece, Copy) and piece.source in tensors and ".norm_" in piece.source:
            known.add(piece.source)
            lora.norms[piece.name.removesuffix(".weight")] = tensors[piece.source]
    for key in sorted(set(tensors) - known):
        module, _, kind = key.rpartition(".lora_")
        if kind == "A.weight" and f"{module}.lora_B.weight" in tensors:
            lora.factors[module] = Factors(tensors[key], tensors[f"{module}.lora_B.weight"])
        elif kind == "B.bias":
            lora.biases[module] = tensors[key]
        elif kind != "B.weight":
            lora.unknown.append(key)
    return out_of_folded(lora, _folded(source))


def _layer(piece: SvdqPiece | AwqPiece, tensors: Mapping[str, Tensor], source: Source, lora: LoraWeights) -> set[str]:
    """Add what the file holds for one layer to `lora`; returns the keys it was under."""
    down, up, bias = (f"{piece.prefix}.{part}" for part in ("lora_down", "lora_up", "bias"))
    known = set()
    if down in tensors and up in tensors:
        known |= {down, up}
        if isinstance(piece, AwqPiece):
            rows = tensors[up].view(-1, piece.chunks, tensors[up].shape[1]).transpose(0, 1).reshape(tensors[up].shape)
            lora.factors[piece.name] = Factors(tensors[down], rows)
        else:
            factors = packing.unpack_lora_down(tensors[down]), packing.unpack_lora_up(tensors[up])
            _unpacked(piece, *factors, source, lora)
    if bias in tensors:
        known.add(bias)
        delta = _in_plain_order(piece, tensors[bias].float()) - _stored_bias(piece, source)[0]
        for name, rows in _bias_rows(piece).items():
            # proj_out has one bias: that of its attention half counts for the whole.
            lora.biases[name.removesuffix(".attn") if name.endswith(".proj_out.attn") else name] = delta[rows]
    return known


def _folded(source: Source) -> dict[str, Tensor]:
    names = outputs([name.removesuffix(".smooth_orig") for name in source if name.endswith(".smooth_orig")])
    found = {name: smooth_in_values(source, name) for name in names}
    return {name: smooth for name, smooth in found.items() if smooth is not None}


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
    # A loaded model's layer may be wider: inputs are filled up to whole groups of scales.
    return Factors(source[f"{piece.parts[0].name}.lora_down"][:, : piece.width], up)


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


def _bias(piece: SvdqPiece | AwqPiece, lora: LoraWeights, source: Source, used: set[str]) -> dict[str, Tensor]:
    """The stored bias with the LoRA's deltas added."""
    deltas = {}
    for name, rows in _bias_rows(piece).items():
        # proj_out's delta goes to its attention half, where the stored bias is zero.
        module = name.removesuffix(".attn") if name.endswith(".proj_out.attn") else name
        if module in lora.biases:
            deltas[name] = (rows, lora.biases[module])
            used.add(name)
    if not deltas:
        return {}
    plain, kind = _stored_bias(piece, source)
    for name, (rows, delta) in deltas.items():
        if delta.numel() != plain[rows].numel():
            raise CheckpointError(f"{name} has {plain[rows].numel()} outputs, but its LoRA's bias {delta.numel()}")
        plain[rows] += delta.float()
    return {f"{piece.prefix}.bias": _in_stored_order(piece, plain).to(kind)}


def _bias_rows(piece: SvdqPiece | AwqPiece) -> dict[str, slice | Tensor]:
    if isinstance(piece, AwqPiece):
        return {piece.name: slice(0, piece.n)}
    return {part.name: part.rows for part in piece.parts}


def _stored_bias(piece: SvdqPiece | AwqPiece, source: Source) -> tuple[Tensor, torch.dtype]:
    """The checkpoint's stored bias in plain order as float32, and the dtype it is stored in."""
    names = (*piece.canonical(), *piece.optional())
    stored = piece.encode({name: source[name] for name in names if name in source})[f"{piece.prefix}.bias"]
    return _in_plain_order(piece, stored.float()), stored.dtype


def _in_plain_order(piece: SvdqPiece | AwqPiece, stored: Tensor) -> Tensor:
    if isinstance(piece, SvdqPiece):
        return packing.unpack_vector(stored)
    return stored.view(-1, piece.chunks).T.reshape(-1)


def _in_stored_order(piece: SvdqPiece | AwqPiece, plain: Tensor) -> Tensor:
    if isinstance(piece, SvdqPiece):
        return packing.pack_vector(plain)
    return plain.view(piece.chunks, -1).T.reshape(-1)


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
