"""The network, and `Probe`, which turns its maps into detections.

A picture of 256 x 256 gives maps of 32 x 32 cells. One channel says where the visible middle of an object is; the
others are read at such a cell: shape, colour, size, material, the way to the projected centre, and depth.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from zoo.scenes import lexicon

STRIDE = 8
CHANNELS = {"heat": 1, "shape": 4, "color": 8, "size": 2, "material": 2, "offset": 2, "depth": 1}
ATTRIBUTES = {"shape": lexicon.SHAPES, "color": lexicon.COLORS, "size": lexicon.SIZES, "material": lexicon.MATERIALS}
DEPTH_MIDDLE, DEPTH_SPREAD = 7.8, 1.2  # metres; the network predicts (depth - middle) / spread
THRESHOLD = 0.35
WEIGHTS, REPORT = "probe.safetensors", "probe.json"


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object: its attributes by name, its projected centre in [0, 1] from the top left, depth in metres."""

    shape: str
    color: str
    size: str
    material: str
    x: float
    y: float
    depth: float
    score: float


class _Block(nn.Module):
    """Residual 3x3 convolution pair with a wider step, to see the whole picture from each cell."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.mix = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(functional.silu(self.mix(functional.silu(self.norm(x)))))


class Network(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] to a dict of maps (B, channels, H/8, W/8); `heat` holds logits."""

    def __init__(self, width: int = 128, dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 4, 1)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 4, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width // 4, width // 2, 3, stride=2, padding=1),
            nn.GroupNorm(8, width // 2),
            nn.SiLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
        )
        self.body = nn.Sequential(*(_Block(width, d) for d in dilations))
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, sum(CHANNELS.values()), 1))
        nn.init.constant_(self.head[2].bias[:1], -4.0)  # objects are rare among cells

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.head(self.body(self.stem(images * 2 - 1))).float()
        return dict(zip(CHANNELS, maps.split(list(CHANNELS.values()), 1), strict=True))


class Probe:
    """A trained detector on one device."""

    def __init__(self, network: Network, report: dict | None = None) -> None:
        self.network = network.eval()
        self.report = report or {}

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> Probe:
        """Open what `save` wrote. Raises FileNotFoundError naming the missing file and how to make it."""
        path = Path(folder) / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; train a probe with: python -m zoo.probe.train --out {folder}")
        network = Network()
        network.load_state_dict({name: t.float() for name, t in load_file(path).items()})
        report = Path(folder) / REPORT
        return cls(network.to(device), json.loads(report.read_text()) if report.is_file() else None)

    def save(self, folder: str | Path) -> None:
        """Write the weights in half precision (about 2.6 MB) and the accuracy report."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: t.detach().half().cpu().contiguous() for name, t in self.network.state_dict().items()}
        save_file(state, folder / WEIGHTS)
        (folder / REPORT).write_text(json.dumps(self.report, indent=2) + "\n")

    @torch.inference_mode()
    def detect(self, images: torch.Tensor, batch: int = 64) -> list[list[Detection]]:
        """Objects of each picture, best first. `images`: (B, 3, 256, 256) uint8 on any device.

        Raises ValueError for another shape or type.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE:
            raise ValueError(f"images must be (B, 3, H, W) uint8 with sides a multiple of {STRIDE}, got "
                             f"{tuple(images.shape)} {images.dtype}")  # fmt: skip
        device = next(self.network.parameters()).device
        found = []
        for part in images.split(batch):
            maps = self.network(part.to(device).float() / 255)
            found += decode({name: m.cpu() for name, m in maps.items()})
        return found


def decode(maps: dict[str, torch.Tensor], limit: int = 6) -> list[list[Detection]]:
    """Read detections off the maps of a batch: peaks of the heat map above the threshold, at most `limit`."""
    heat = maps["heat"].sigmoid()
    rows, columns = heat.shape[2:]
    peak = heat * (functional.max_pool2d(heat, 3, 1, 1) == heat)
    scores, cells = peak.flatten(1).topk(limit)
    batch = []
    for b in range(len(heat)):
        picture = []
        for score, cell in zip(scores[b].tolist(), cells[b].tolist(), strict=True):
            if score < THRESHOLD:
                break
            y, x = divmod(cell, columns)
            names = {name: words[int(maps[name][b, :, y, x].argmax())] for name, words in ATTRIBUTES.items()}
            dx, dy = maps["offset"][b, :, y, x].tolist()
            depth = float(maps["depth"][b, 0, y, x]) * DEPTH_SPREAD + DEPTH_MIDDLE
            picture.append(Detection(**names, x=(x + dx) / columns, y=(y + dy) / rows, depth=depth, score=score))
        batch.append(picture)
    return batch
