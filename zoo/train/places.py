"""A training aid: says, from the prompt's states alone, which objects a picture shows and where.

Relations ("left of", "behind") are of little weight in the velocity: a model can halve its loss with the right objects
in the wrong places. Here the text encoder is asked directly: which objects, where, and in which order where the prompt
states one. It is not exported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from zoo.train.pool import TOKEN_CLASSES

LOOKS = TOKEN_CLASSES - 1  # shape * 8 + colour
KNOWN = ("labels", "tokens", "relations")  # what is known of a batch's pictures, in the order that `Places.loss` takes
_SHARP = 4.0  # logits for half a picture: an order that far apart costs 0.02 nats, the wrong one 4


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


def ahead(where: torch.Tensor, relations: torch.Tensor) -> torch.Tensor:
    """How far the first look of each stated relation lies from the second the way the relation says: (B, 2).

    where (B, 32, 2) centres; relations (B, 2, 3), see captions.relations. Negative is the wrong order, 0 no relation.
    """
    first, kind, second = relations.unbind(-1)
    left, right, front, behind = (kind == 1 + each for each in range(4))
    axis = (front | behind).long()  # what stands in front is lower in the picture, where y is larger
    sign = (right | front).float() - (left | behind).float()
    flat = where.flatten(1)  # (B, 64), x and y of look 0, of look 1, ...
    return sign * (flat.gather(1, 2 * first + axis) - flat.gather(1, 2 * second + axis))


def weighed(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum that training lowers, of what `Places.loss` gives."""
    return terms["named"] + 4 * terms["apart"] + terms["order"]


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

    def loss(self, states: torch.Tensor, t5_ids: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor,
             relations: torch.Tensor) -> dict[str, torch.Tensor]:  # fmt: skip
        """What the answer costs, three 0-d tensors; empty prompts do not count.

        named: cross-entropy of being there, a sum over looks. apart: squared distance of centres. A prompt that leaves
        the relation open is answered best by the mean of what may be, so it does not reach 0; nor does it say much
        about relations, since the mean is nearly as good as the places that follow from one. So order: a logistic
        loss of the two looks' order, over the relations that the prompts state, a mean.
        """
        there, where = self(states, t5_ids)
        said = (t5_ids[:, 1] != 0).float()
        named = F.binary_cross_entropy_with_logits(there, present(labels), reduction="none").sum(1)
        wanted, seen = centres(tokens)
        apart = ((where - wanted).square().sum(-1) * seen).sum(1) / seen.sum(1).clamp(min=1)
        stated = (relations[..., 1] > 0) * said.unsqueeze(1)
        wrong = F.softplus(-_SHARP * ahead(where, relations)) * stated
        order = wrong.sum() / stated.sum().clamp(min=1)
        return {"named": (named * said).mean(), "apart": (apart * said).mean(), "order": order}


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


@torch.no_grad()
def stated_told(places: Places, states: torch.Tensor, t5_ids: torch.Tensor,
                relations: torch.Tensor) -> dict[str, float]:  # fmt: skip
    """Share of stated relations whose order the prompt's answer has: "left_right" and "front_behind", 1 at best.

    relations (B, 2, 3). One half is chance; a kind that no prompt states is left out.
    """
    right, kind = ahead(places(states, t5_ids)[1], relations) > 0, relations[..., 1]
    kinds = {"left_right": (kind == 1) | (kind == 2), "front_behind": kind > 2}
    return {name: float(right[some].float().mean()) for name, some in kinds.items() if some.any()}
