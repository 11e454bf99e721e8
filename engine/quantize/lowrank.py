"""The 16-bit low-rank branch: the part of a weight that rounding would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.inputs import unweigh, weigh

__all__ = ["factors", "low_rank"]

_SPARE = 10  # directions more than the rank, from which the best are taken
_ITERATIONS = 4


def low_rank(weight: Tensor, rank: int, root: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Best rank-R factors of `weight` (N, K) for the inputs it sees: up (N, R), down (R, K).

    Minimises ||(weight - up @ down) @ root||, where root @ root.T is the second moment of the input (K, K): an error
    counts by what it does to the output. A root that is diagonal may be given as its diagonal (K).
    """
    return factors(weigh(weight, root), rank, root, seed)


def factors(weighed: Tensor, rank: int, root: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`low_rank` of a weight that was multiplied by the root already (N, K).

    A rank far below the matrix's own is found by a randomized SVD of that seed, a higher one by an exact SVD.
    """
    if rank == 0:
        return weighed[:, :0], weighed[:0]
    u, s, v = _svd(weighed, rank, seed)
    return u * s.sqrt(), unweigh((v * s.sqrt()).T, root)


def _svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    wanted = rank + _SPARE
    if 2 * wanted <= min(matrix.shape):
        return _subspace_svd(matrix, rank, wanted, seed)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def _subspace_svd(matrix: Tensor, rank: int, wanted: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets by subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4).

    Householder QR of tall matrices and small SVDs leave a GPU idle for milliseconds each; here both become products
    and factorizations of matrices as wide as the subspace, in float64, which loses nothing that float32 held. On a CPU
    it takes a tenth of an exact SVD's time at the widths of the small models.
    """
    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = torch.randn(matrix.shape[1], wanted, generator=generator, device=matrix.device)
    left = _orthonormal(matrix @ start)
    for _ in range(_ITERATIONS):
        left = _orthonormal(matrix @ _orthonormal(matrix.T @ left))
    within = left.T @ matrix  # (wanted, K)
    square = within.double() @ within.double().T
    values, vectors = torch.linalg.eigh(square)
    s = values.flip(0)[:rank].clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    turn = vectors.flip(1)[:, :rank]
    v = (within.double().T @ turn / s).float()
    return left @ turn.float(), s.float(), v


def _orthonormal(tall: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `tall` (M, Q), by Cholesky QR done twice."""
    for _ in range(2):
        wide = tall.double()
        square = wide.T @ wide
        square.diagonal().add_(1e-14 * square.diagonal().sum() + 1e-60)  # what is not there stays small, not NaN
        root = torch.linalg.cholesky(square)
        tall = torch.linalg.solve_triangular(root, wide.T, upper=False).T.float()
    return tall
