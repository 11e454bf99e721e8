"""What a group of linears reads, and the weighing of errors that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Inputs", "unweigh", "weigh"]


@dataclass(frozen=True)
class Inputs:
    """What a group of linears saw in calibration: sampled rows (S, K) and the largest magnitude a channel (K).

    `rows` is None where nothing is known: every channel then counts alike and none has to do with another.
    """

    rows: Tensor | None
    largest: Tensor

    @classmethod
    def unknown(cls, k: int, device: torch.device) -> Inputs:
        """Stand-in without calibration data."""
        return cls(None, torch.ones(k, device=device))

    def padded(self, missing: int) -> Inputs:
        """The same with `missing` more channels that are always zero."""
        rows = None if self.rows is None else F.pad(self.rows, (0, missing))
        return Inputs(rows, F.pad(self.largest, (0, missing)))

    def mean_square(self) -> Tensor:
        """Mean square of each channel (K)."""
        return torch.ones_like(self.largest) if self.rows is None else self.rows.float().square().mean(0)

    def moments(self, smooth: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """Mean square (K) and a root of the damped second moment of the input divided by `smooth` (K).

        The root is lower triangular (K, K); where nothing is known the moment is diagonal, needs no damping, and the
        root is its diagonal alone (K).
        """
        if self.rows is None:
            square = smooth.float() ** -2
            return square, square.sqrt()
        rows = self.rows.float() / smooth
        moment = rows.T @ rows / len(rows)
        moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-12)
        return rows.square().mean(0), torch.linalg.cholesky(moment)


def weigh(matrix: Tensor, root: Tensor) -> Tensor:
    """matrix (N, K) @ root: its squared size is then the mean square of what it makes of the inputs."""
    return matrix * root if root.ndim == 1 else matrix @ root


def unweigh(matrix: Tensor, root: Tensor) -> Tensor:
    """Undo `weigh`."""
    if root.ndim == 1:
        return matrix / root
    return torch.linalg.solve_triangular(root, matrix, upper=False, left=False)
