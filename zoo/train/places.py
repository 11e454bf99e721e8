"""A training aid: says, from the prompt's states alone, which objects a picture shows and where.

Relations ("left of", "behind") are of little weight in the velocity: a model can halve its loss with the right objects
in the wrong places. Here the text encoder is asked directly. It is not exported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.train.pool import TOKEN_CLASSES

LOOKS = TOKEN_CLASSES - 1  # shape * 8 + colour


def present(labels: torch.Tensor) -> torch.Tensor:
    """labels (B, 128), see captions.LABELS -> (B, 32) float32, 1 where an object of that look is there."""
    return labels[:, : 2 * LOOKS].unflatten(1, (LOOKS, 2)).amax(-1).float()


def centres(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each look is seen: (B, 32, 2) x and y in [-1, 1], and (B, 32) whether it is seen at all.

    tokens (B, N) are the classes of a square picture's tokens, row by row.
    """
    side = int(tokens.shape[1] ** 0.5)
    looks = torch.arange(1, TOKEN_CLASSES, device=tokens.device)
    shown = (tokens.unsqueeze(-1) == looks).float()  # (B, N, 32)
    line = (torch.arange(side, device=tokens.device) + 0.5) / side * 2 - 1
    grid = torch.stack([line.repeat(side), line.repeat_interleave(side)], 1)  # (N, 2)
    area = shown.sum(1)
    return torch.einsum("bnc,nd->bcd", shown, grid) / area.clamp(min=1).unsqueeze(-1), area > 0


class Places(nn.Module):
    """One question a look, answered by attention over the prompt's tokens, so that each token must tell its part."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.asks = nn.Parameter(torch.randn(LOOKS, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    def forward(self, states: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """states (B, L, width), t5_ids (B, L) -> logits of being there (B, 32), centres (B, 32, 2); both float32."""
        asks = self.asks.expand(len(states), -1, -1)
        bias = torch.zeros(t5_ids.shape, device=t5_ids.device, dtype=states.dtype).masked_fill(t5_ids == 0, -1e4)
        told = self.attention(asks.to(states.dtype), states, states, key_padding_mask=bias, need_weights=False)[0]
        out = self.head(told).float()
        return out[..., 0], out[..., 1:].tanh()

    def loss(self, states: torch.Tensor, t5_ids: torch.Tensor, labels: torch.Tensor,
             tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Cross-entropy of being there (a sum over looks) and squared distance of centres; empty prompts do not count.

        A prompt that leaves the relation open is answered best by the mean of what may be: the loss does not reach 0.
        """
        there, where = self(states, t5_ids)
        said = (t5_ids[:, 1] != 0).float()
        named = F.binary_cross_entropy_with_logits(there, present(labels), reduction="none").sum(1)
        wanted, seen = centres(tokens)
        apart = ((where - wanted).square().sum(-1) * seen).sum(1) / seen.sum(1).clamp(min=1)
        return (named * said).mean(), (apart * said).mean()


@torch.no_grad()
def order_told(places: Places, states: torch.Tensor, t5_ids: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of pairs of seen objects whose order from left to right, and from back to front, the prompt's answer has.

    One half is chance. Pairs closer than a token in a direction do not count there; prompts that leave the order open
    do, so 1 is out of reach.
    """
    _, where = places(states, t5_ids)
    wanted, seen = centres(tokens)
    pair = (seen.unsqueeze(1) & seen.unsqueeze(2)).unsqueeze(-1)
    gap, told = (x.unsqueeze(1) - x.unsqueeze(2) for x in (wanted, where))
    clear = pair & (gap > 2 / int(tokens.shape[1] ** 0.5))
    return float(((told > 0) & clear).sum() / clear.sum().clamp(min=1))
