"""Batches for the small SANA's stages: rows of a pool, with prompts as SanaPipeline.encode_prompt makes them.

Begin token, perhaps the instruction, the prompt, padding that the cross-attention masks. Dropped prompts are the begin
token alone, as the pipeline encodes an empty negative prompt.
"""

from __future__ import annotations

import torch

from zoo.train.dist import World
from zoo.train.pool import by_count
from zoo.train.sana_pool import Pool
from zoo.train.sana_text import BOS, PAD


class Batches:
    """Draws the batches of one process from a pool, `size` rows each.

    instruction: that token's id. told, drop: shares of the prompts that get it before them, and that are left out.
    """

    def __init__(self, pool: Pool, size: int, instruction: int, world: World, seed: int, *, told: float, drop: float,
                 pictures: bool = True) -> None:  # fmt: skip
        self.pool, self.size, self.instruction, self.pictures = pool, size, instruction, pictures
        self.told, self.drop = told, drop
        self.generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)
        self.rows = by_count(pool.labels)

    def __call__(self) -> dict[str, torch.Tensor]:
        """ids (B, L), labels (B, 128), tokens (B, N), relations (B, 2, 3), and with pictures x0 and noise."""
        g, device, pool = self.generator, self.generator.device, self.pool
        rows = self.rows[torch.randint(len(self.rows), (self.size,), generator=g, device=device)]
        column = torch.randint(pool.ids.shape[1], (self.size,), generator=g, device=device)
        said = {"ids": self.prompts(pool.ids[rows, column].long()), "relations": pool.relations[rows, column].long()}
        seen = {"labels": pool.labels[rows], "tokens": pool.tokens[rows]}
        if not self.pictures:
            return {**said, **seen}
        x0 = pool.latents[rows].float()
        return {**said, **seen, "x0": x0, "noise": torch.randn(x0.shape, generator=g, device=device)}

    def prompts(self, ids: torch.Tensor) -> torch.Tensor:
        """Put the instruction before some of the prompts (B, L) and drop some of them whole."""
        chance = torch.rand(2, len(ids), 1, generator=self.generator, device=ids.device)
        instructed = torch.cat([ids[:, :1], torch.full_like(ids[:, :1], self.instruction), ids[:, 1:-1]], 1)
        ids = torch.where(chance[0] < self.told, instructed, ids)
        empty = torch.full_like(ids, PAD)
        empty[:, 0] = BOS
        return torch.where(chance[1] < self.drop, empty, ids)
