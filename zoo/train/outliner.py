"""A small network that finds the objects' lines in a picture, to ask of a painted picture whether it keeps to a sketch.

An edge detector also answers to shadows, checks and reflections; this one learned from renders which edges are lines
of solids. Shapes: B pictures of S x S pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from zoo.train.dist import World
from zoo.train.edges import edge_f1
from zoo.train.graph import autocast
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, FlatModel

WEIGHTS = "outline.safetensors"
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.mix = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(F.silu(self.mix(self.norm(x))))


class Outliner(nn.Module):
    """uint8 pictures (B, 3, S, S) to logits (B, S, S) of being on an object's line."""

    def __init__(self, width: int = 48, dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 1)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(12, width, 3, padding=1)
        self.body = nn.Sequential(*(_Block(width, d) for d in dilations))
        self.head = nn.Conv2d(width, 4, 3, padding=1)
        self.threshold = 0.4

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = F.pixel_unshuffle(pictures.float() / 127.5 - 1, 2)
        return F.pixel_shuffle(self.head(self.body(self.stem(x))).float(), 2).squeeze(1)

    @torch.no_grad()
    def find(self, pictures: torch.Tensor, batch: int = 32) -> torch.Tensor:
        """Lines of pictures on any device: (B, S, S) bool on the network's device."""
        device = self.stem.weight.device
        parts = [self(part.to(device)).sigmoid() > self.threshold for part in pictures.split(batch)]
        return torch.cat(parts)

    def save(self, folder: Path, about: dict) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().half().cpu().contiguous() for name, value in self.state_dict().items()}
        save_file(
            state, folder / WEIGHTS, {"format": "pt", "about": json.dumps({**about, "threshold": self.threshold})}
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Outliner:
        """Open what `save` wrote. Raises FileNotFoundError that says how to make it."""
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; python -m zoo.train.sketch writes it to OUT/outline")
        network = cls()
        network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        with safe_open(path, "pt") as file:
            network.threshold = json.loads((file.metadata() or {}).get("about", "{}")).get("threshold", 0.4)
        return network.to(device).eval()


def outline_iou(found: torch.Tensor, wanted: torch.Tensor, tolerance: int = 2) -> torch.Tensor:
    """Intersection over union of two sets of lines, where pixels up to `tolerance` apart are the same: (B,) in [0, 1].

    Both (B, S, S) bool. It is F1 / (2 - F1) of the tolerant match, as for plain sets.
    """
    f1 = edge_f1(found, wanted, tolerance)
    return f1 / (2 - f1)


Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
"""(size, generator) -> pictures (B, 3, S, S) uint8 and their lines (B, S, S) bool."""


def train(draw: Draw, valid: tuple[torch.Tensor, torch.Tensor], config: dict, world: World, log: Log, deadline: float,
          max_steps: int | None = None) -> Outliner:  # fmt: skip
    """A network trained until `deadline`, its threshold the best one on `valid`."""
    network = Outliner().to(world.device)
    model = FlatModel(network, world, lr=config["lr"], betas=(0.9, 0.99), weight_decay=0.01)
    clock = Clock(world, deadline, warmup=20, max_steps=max_steps)
    meter = Meter(log, "outline", config["batch"] * world.size, 0.0, "", world.size, every=5.0)
    generator = torch.Generator(world.device).manual_seed(77 + world.rank)
    running = True
    while running:
        pictures, lines = draw(config["batch"], generator)
        model.zero_grad()
        with autocast(world):
            logits = network(pictures)
        loss = _loss(logits, lines.float())
        loss.backward()
        model.step(clock.factor)
        meter.add(loss=loss)
        running = clock.tick()
        meter.report(force=not running)
    model.broadcast()
    network.eval()
    network.threshold, iou = calibrate(network, *valid)
    log("outline", threshold=network.threshold, iou_on_renders=iou, at=round(time.time() - log.started, 1))
    return network


def _loss(logits: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, and an overlap term that minds how few the pixels of lines are."""
    p = logits.sigmoid()
    overlap = 2 * (p * lines).sum((1, 2)) / (p.sum((1, 2)) + lines.sum((1, 2))).clamp(min=1)
    return F.binary_cross_entropy_with_logits(logits, lines) + 0.2 * (1 - overlap).mean()


@torch.no_grad()
def calibrate(network: Outliner, pictures: torch.Tensor, lines: torch.Tensor) -> tuple[float, float]:
    """The threshold with the highest mean IoU on known pictures, and that IoU."""
    scores = {}
    for network.threshold in THRESHOLDS:
        scores[network.threshold] = float(outline_iou(network.find(pictures), lines).mean())
    best = max(scores, key=lambda t: scores[t])
    return best, round(scores[best], 4)
