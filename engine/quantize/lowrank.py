"""The 16-bit low-rank branch: the part of a weight that rounding would lose."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["low_rank"]

_EXACT_BELOW = 2048


def low_rank(weight: Tensor, rank: int, root: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Best rank-R factors of `weight` (N, K) for the inputs it sees: up (N, R), down (R, K).

    Minimises ||(weight - up @ down) @ root||, where root @ root.T is the second moment of the input (K, K): an error
    counts by what it does to the output. Small matrices take an exact SVD, large ones a randomized one, same seed.
    """
    whitened = weight @ root
    u, s, v = _svd(whitened, rank, seed)
    up = u * s.sqrt()
    down = torch.linalg.solve_triangular(root, (v * s.sqrt()).T, upper=False, left=False)
    return up, down


def _svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    if min(matrix.shape) <= _EXACT_BELOW:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank].T
    devices = [matrix.device] if matrix.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, q=rank + 10, niter=4)
    return u[:, :rank], s[:rank], v[:, :rank]
