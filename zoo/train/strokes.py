"""Line drawings of rendered scenes, as a hand draws them: black strokes on a white page, in torch, on the GPU.

Lines come from exact maps of the scene (object slots and normals), drawn at twice the size: outlines where the object
changes, creases where a surface turns, ground lines where floor, wall and sky meet. A drawing keeps some kinds of them,
in strokes whose width wanders, that wave a little and have gaps.
Shape letters: B batch, S side of the drawing in pixels.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from zoo.scenes import Scenes, geometry_maps
from zoo.scenes.maps import creases

FINE = 2  # lines are found and drawn this much larger, then reduced: that makes their edges soft
WIDEST = 5  # half-width of the boldest stroke, in fine pixels: 5.5 pixels of the drawing


@dataclasses.dataclass
class Lines:
    """One pixel wide lines of B scenes, each (B, 2S, 2S) bool."""

    outline: torch.Tensor  # around every object, also where one hides another
    crease: torch.Tensor  # inside an object: edges of a cube, rim of a cylinder
    ground: torch.Tensor  # floor against wall or sky

    @property
    def objects(self) -> torch.Tensor:
        return self.outline | self.crease

    def thin(self) -> torch.Tensor:
        """Lines of the objects at the drawing's own size, (B, S, S) bool."""
        return F.max_pool2d(self.objects.half(), FINE).bool()


@torch.no_grad()
def find(scenes: Scenes, size: int, device: torch.device | str) -> Lines:
    """The lines of scenes for drawings of `size` pixels."""
    depth, mask, normal = geometry_maps(scenes, FINE * size, device)
    every = creases(depth, mask, normal)
    on_object, changes = mask >= 0, _changes(mask)
    # Outlines come from the slots alone: at an object's foot the floor is as near, and depth cannot choose.
    return Lines(on_object & changes, every & on_object & ~changes, every & ~on_object & ~changes)


def _changes(mask: torch.Tensor) -> torch.Tensor:
    """Pixels with another slot beside, above or below them."""
    wide = F.pad(mask[:, None].float(), (1, 1, 1, 1), mode="replicate").squeeze(1)
    own, out = wide[:, 1:-1, 1:-1], torch.zeros_like(mask, dtype=torch.bool)
    for other in (wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]):
        out |= own != other
    return out


def smooth(n: int, channels: int, cells: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Random fields of about unit spread that change over side / cells pixels: (n, channels, side, side)."""
    coarse = torch.randn(n, channels, cells, cells, generator=generator, device=generator.device)
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)


def widen(ink: torch.Tensor, half_width: torch.Tensor) -> torch.Tensor:
    """Strokes from lines: (B, H, W) bool and half-widths in pixels, broadcastable, to (B, H, W) in {0, 1}.

    Square and diamond steps take turns, which makes a round enough brush.
    """
    grown = ink[:, None].float()
    out = grown
    for step in range(1, WIDEST + 1):
        if step % 2:
            grown = torch.maximum(F.max_pool2d(grown, (3, 1), 1, (1, 0)), F.max_pool2d(grown, (1, 3), 1, (0, 1)))
        else:
            grown = F.max_pool2d(grown, 3, 1, 1)
        out = torch.maximum(out, grown * (half_width[:, None] >= step - 0.5))
    return out.squeeze(1)


def wave(ink: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Move the ink (B, H, W) by `shift` (B, 2, H, W), in pixels."""
    n, side = len(ink), ink.shape[-1]
    at = (torch.arange(side, device=ink.device) + 0.5) * (2 / side) - 1
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).expand(n, -1, -1, -1)
    moved = F.grid_sample(ink[:, None], grid + shift.movedim(1, -1) * (2 / side), align_corners=False)
    return moved.squeeze(1)


def _page(ink: torch.Tensor) -> torch.Tensor:
    return (255 * (1 - F.avg_pool2d(ink[:, None], FINE).squeeze(1)) + 0.5).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def draw(lines: Lines, generator: torch.Generator) -> torch.Tensor:
    """A drawing of each scene, every one in its own manner: (B, S, S) uint8, black on white."""
    n, side, device = len(lines.outline), lines.outline.shape[-1], lines.outline.device
    rand = lambda low=0.0, high=1.0: low + (high - low) * torch.rand(n, 1, 1, generator=generator, device=device)  # noqa: E731
    ink = lines.outline | (lines.crease & (rand() < 0.85)) | (lines.ground & (rand() < 0.6))
    gaps = smooth(n, 1, max(2, side // 20), side, generator).squeeze(1) > rand(1.3, 2.2)
    ink = ink & ~(gaps & (rand() < 0.4))
    thick = 0.7 + (WIDEST - 0.9) * rand() ** 1.7  # thin strokes are the commoner
    wander = smooth(n, 1, 6, side, generator).squeeze(1) * rand(0, 0.9)
    strokes = widen(ink, (thick + wander).clamp(min=0.6))
    shift = smooth(n, 2, 7, side, generator) * (rand(0, 1.6) * FINE * (rand() < 0.6))[:, None] * side / 512
    return _page(wave(strokes, shift))


@torch.no_grad()
def neat(lines: Lines, half_width: float = 1.0) -> torch.Tensor:
    """Drawings with every line, in even strokes and without a tremble; for tests. (B, S, S) uint8."""
    width = torch.full((1, 1, 1), half_width, device=lines.outline.device)
    return _page(widen(lines.objects | lines.ground, width))
