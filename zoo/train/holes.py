"""Holes to fill: masks of every kind a user draws, and scenes changed under them so that the prompt decides.

A hole cut around an object betrays it: by the outline, by the shadow left outside. A model trained on such holes alone
repaints what was there whatever the prompt says. So in part of the cases the surroundings come from a changed scene, in
which the object is another one, or absent, and the part inside the hole from the scene that the prompt describes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from zoo.scenes import Scenes
from zoo.scenes.lexicon import COLOR_RGB, COLORS, HEIGHT, RADIUS, SHAPES

# Around an object: its dilated outline, its box, brush strokes over it. Anywhere: a box, strokes, all but a rectangle.
KINDS = ("outline", "box", "brush", "free box", "free brush", "border")
OBJECT_KINDS = 3
AWAY = 1000.0  # metres aside: out of sight, and its shadow with it


def pack_mask(hole: torch.Tensor) -> torch.Tensor:
    """Pixels of each token's 16 x 16 square as channels, in FluxFillPipeline's order: (B, S, S) -> (B, N, 256)."""
    b, size, _ = hole.shape
    cells = hole.float().view(b, size // 8, 8, size // 8, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, size // 8, size // 8)
    x = cells.view(b, 64, size // 16, 2, size // 16, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, (size // 16) ** 2, 256)


def read_mask_start() -> torch.Tensor:
    """64 rows that read a packed mask as an 8 x 8 grid of 2 x 2 pixel sums a token, each of length one: (64, 256)."""
    rows = torch.arange(16)[:, None].expand(16, 16) // 2
    columns = torch.arange(16)[None].expand(16, 16) // 2
    block = (rows * 8 + columns)[None]  # which row each pixel belongs to, packed as the pixels are
    order = pack_mask(block)[0, 0].long()
    return 0.5 * F.one_hot(order, 64).float().T


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Grow masks (B, S, S) by `radius` pixels in every direction."""
    return F.max_pool2d(mask.float()[:, None], 2 * radius + 1, 1, radius).squeeze(1) > 0


def bounds(mask: torch.Tensor) -> torch.Tensor:
    """Left, top, right, bottom pixel of each mask, (B, 4) float32; the middle of the picture for an empty one."""
    size = mask.shape[-1]
    at = torch.arange(size, device=mask.device)
    result = []
    for line in (mask.any(1), mask.any(2)):  # columns, rows
        low = torch.where(line, at, size).amin(1)
        high = torch.where(line, at, -1).amax(1)
        empty = high < 0
        result.append((torch.where(empty, 2 * size // 5, low), torch.where(empty, 3 * size // 5, high)))
    (left, right), (top, bottom) = result
    return torch.stack([left, top, right, bottom], 1).float()


def box(edges: torch.Tensor, size: int) -> torch.Tensor:
    """Filled rectangles from (B, 4) left, top, right, bottom: (B, size, size) bool."""
    at = torch.arange(size, device=edges.device, dtype=torch.float32)
    left, top, right, bottom = (edge[:, None] for edge in edges.unbind(1))
    return ((at >= top) & (at <= bottom))[:, :, None] & ((at >= left) & (at <= right))[:, None, :]


def strokes(points: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Round-ended strokes through points (B, P, 2) as x, y, of radius (B,): (B, size, size) bool."""
    at = torch.arange(size, device=points.device, dtype=torch.float32)
    pixel = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)  # (size, size, 2)
    covered = torch.zeros(len(points), size, size, dtype=torch.bool, device=points.device)
    for a, b in zip(points.unbind(1), points[:, 1:].unbind(1), strict=False):
        along = (b - a)[:, None, None]
        from_a = pixel - a[:, None, None]
        part = ((from_a * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
        gap = (from_a - part[..., None] * along).square().sum(-1)
        covered |= gap <= radius[:, None, None].square()
    return covered


def draw(target: torch.Tensor, kind: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A hole a picture, (B, S, S) bool, of the kinds `kind` (B,), indices into KINDS.

    target: masks (B, S, S) of what the hole is about.
    """
    size, radius = target.shape[-1], torch.randint(3, 22, (1,), generator=generator, device=generator.device)
    made = torch.stack([
        dilate(target, max(1, int(radius) * size // 256)), _box_around(target, generator), _scribble(target, generator),
        _free_box(target, generator), _free_brush(target, generator), _border(target, generator),
    ])  # fmt: skip
    return made[kind, torch.arange(len(kind), device=kind.device)]


def _uniform(shape: tuple[int, ...], low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=g, device=g.device)


def _box_around(target: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    size, outward = target.shape[-1], torch.tensor([-1.0, -1.0, 1.0, 1.0], device=target.device)
    return box(bounds(target) + outward * _uniform((len(target), 4), 0.02, 0.16, g) * size, size)


def _scribble(target: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """To and fro over the box of the target, as one paints over a thing to be replaced."""
    n, size, turns = len(target), target.shape[-1], 6
    left, top, right, bottom = bounds(target).unbind(1)
    down = torch.linspace(0, 1, turns, device=target.device)
    y = top[:, None] + (bottom - top)[:, None] * down
    side = (torch.arange(turns, device=target.device) % 2).float()
    x = left[:, None] + (right - left)[:, None] * side
    points = torch.stack([x, y], -1) + _uniform((n, turns, 2), -0.03, 0.03, g) * size
    radius = (bottom - top) / turns * _uniform((n,), 0.9, 1.6, g) + 0.02 * size
    return strokes(points, radius, size) | dilate(target, max(1, size // 64))


def _free_box(target: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    n, size = len(target), target.shape[-1]
    middle, half = _uniform((n, 2), 0.15, 0.85, g), _uniform((n, 2), 0.07, 0.30, g)
    return box(torch.cat([middle - half, middle + half], 1) * size, size)


def _free_brush(target: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    n, size = len(target), target.shape[-1]
    start, steps = _uniform((n, 1, 2), 0.15, 0.85, g), _uniform((n, 5, 2), -0.28, 0.28, g)
    points = torch.cat([start, start + steps.cumsum(1)], 1).clamp(0, 1) * size
    return strokes(points, _uniform((n,), 0.03, 0.11, g) * size, size)


def _border(target: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """All but an inner rectangle: what outpainting fills. At least one side is open."""
    n, size = len(target), target.shape[-1]
    wide = _uniform((n, 4), 0.10, 0.45, g)
    use = torch.rand(n, 4, generator=g, device=g.device) < 0.5
    use[torch.arange(n, device=g.device), torch.randint(4, (n,), generator=g, device=g.device)] = True
    left, top, right, bottom = torch.where(use, wide, 0.0).unbind(1)
    kept = torch.stack([left, top, 1 - right, 1 - bottom], 1) * size
    return ~box(torch.where(kept >= size, float(size), kept), size)


def swap(scenes: Scenes, slot: torch.Tensor, rng: np.random.Generator) -> Scenes:
    """The scenes with one object each (slot (B,)) replaced by one of another colour and perhaps another shape."""
    rows = torch.arange(len(scenes))
    pick = lambda high: torch.from_numpy(rng.integers(0, high, len(scenes)))  # noqa: E731
    shape, color, material = scenes.shape.clone(), scenes.color.clone(), scenes.material.clone()
    rgb, position = scenes.rgb.clone(), scenes.position.clone()
    shape[rows, slot], material[rows, slot] = pick(len(SHAPES)), pick(2)
    color[rows, slot] = (color[rows, slot] + 1 + pick(len(COLORS) - 1)) % len(COLORS)
    rgb[rows, slot] = torch.tensor(COLOR_RGB)[color[rows, slot]]
    radius = torch.tensor(RADIUS)[scenes.size[rows, slot]]
    position[rows, slot, 1] = radius * torch.tensor(HEIGHT)[shape[rows, slot]] / 2
    return dataclasses.replace(scenes, shape=shape, color=color, material=material, rgb=rgb, position=position)


def without(scenes: Scenes, slot: torch.Tensor) -> Scenes:
    """The scenes with one object each out of sight; no slot changes its number."""
    position = scenes.position.clone()
    position[torch.arange(len(scenes)), slot, 0] += AWAY
    return dataclasses.replace(scenes, position=position)


def choose(swapped: Scenes, absent: Scenes, take_absent: torch.Tensor) -> Scenes:
    """Row by row one of two batches of scenes: `absent` where take_absent (B,) is true."""
    values = {}
    for field in dataclasses.fields(Scenes):
        a, b = getattr(swapped, field.name), getattr(absent, field.name)
        if isinstance(a, torch.Tensor):
            pick = take_absent.view(-1, *([1] * (a.ndim - 1)))
            values[field.name] = torch.where(pick, b, a)
        else:
            values[field.name] = a
    return Scenes(**values)
