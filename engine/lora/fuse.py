"""Put LoRA factors of several linears together: stacked rows that share an input, and ranks side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.lora.weights import Factors, LoraWeights

__all__ = ["FUSED", "add_ranks", "pad_rank", "part_factors", "stack_rows"]

RANK_TILE = 16
# Fused leaves that some tools write -> the leaves they stack.
FUSED = {
    "attn.to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.add_qkv_proj": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn1.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    # diffusers' own name for the second
    "attn.to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def stack_rows(parts: Sequence[Factors | None], rows: Sequence[int]) -> Factors | None:
    """Factors of linears that read one input, as those of their row-concatenation; None when there are none.

    `rows` are the N of each. Equal down-projections are kept once, different ones are stacked and the up-projection
    becomes block diagonal; a linear without factors gets zero rows.
    """
    present = [part for part in parts if part is not None]
    if not present:
        return None
    downs = _distinct([part.down for part in present])
    rank = sum(down.shape[0] for down in downs)
    up = present[0].up.new_zeros((sum(rows), rank))
    start = 0
    for part, n in zip(parts, rows, strict=True):
        if part is not None:
            if part.up.shape[0] != n:
                raise CheckpointError(
                    f"a LoRA for a linear of {n} outputs has {part.up.shape[0]} rows; it is of another model"
                )
            where = next(index for index, down in enumerate(downs) if down is part.down or torch.equal(down, part.down))
            column = sum(down.shape[0] for down in downs[:where])
            up[start : start + n, column : column + part.down.shape[0]] = part.up
        start += n
    return Factors(torch.cat(downs), up)


def add_ranks(parts: Sequence[Factors]) -> Factors:
    """The sum of several deltas: ranks side by side."""
    return Factors(torch.cat([part.down for part in parts]), torch.cat([part.up for part in parts], 1))


def pad_rank(factors: Factors, rank: int | None = None) -> Factors:
    """Fill the rank up with zeros, to `rank` or to a multiple of 16."""
    more = (-factors.down.shape[0] % RANK_TILE) if rank is None else rank - factors.down.shape[0]
    if not more:
        return factors
    return Factors(
        torch.nn.functional.pad(factors.down, (0, 0, 0, more)), torch.nn.functional.pad(factors.up, (0, more))
    )


def part_factors(lora: LoraWeights, name: str, n: int, k: int) -> Factors | None:
    """Factors for the canonical linear `name` of N rows over K inputs: its own, or its share of a wider layer's.

    A single block's `proj_out.attn` and `proj_out.mlp` are columns of `proj_out`; q, k and v may come fused.
    """
    found = lora.factors.get(name) or _from_proj_out(lora, name) or _from_fused(lora, name)
    if found is None:
        return None
    if found.down.shape[1] != k or found.up.shape[0] != n:
        raise CheckpointError(
            f"{name} takes {k} inputs to {n} outputs, but its LoRA {found.down.shape[1]} to {found.up.shape[0]};"
            " it was made for another model"
        )
    return found


def _from_proj_out(lora: LoraWeights, name: str) -> Factors | None:
    parent, _, half = name.rpartition(".")
    if half not in ("attn", "mlp") or not parent.endswith(".proj_out") or parent not in lora.factors:
        return None
    down, up = lora.factors[parent]
    width = up.shape[0]
    return Factors(down[:, :width] if half == "attn" else down[:, width:], up)


def _from_fused(lora: LoraWeights, name: str) -> Factors | None:
    for fused, leaves in FUSED.items():
        for index, leaf in enumerate(leaves):
            whole = lora.factors.get(name.removesuffix(leaf) + fused) if name.endswith(f".{leaf}") else None
            if whole is not None:
                return Factors(whole.down, whole.up.chunk(len(leaves))[index])
    return None


def _distinct(downs: Sequence[Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    for down in downs:
        if not any(down is other or (down.shape == other.shape and torch.equal(down, other)) for other in kept):
            kept.append(down)
    return kept
