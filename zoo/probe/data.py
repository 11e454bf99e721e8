"""Pictures with what they show, held on one device, and the target maps made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from zoo import scenes
from zoo.probe.model import DEPTH_MIDDLE, DEPTH_SPREAD, STRIDE
from zoo.scenes import geometry


@dataclasses.dataclass
class Pool:
    """B pictures and their objects (K slots), all on one device. Places are shares of the picture in [0, 1]."""

    images: torch.Tensor  # (B, 3, H, W) uint8
    present: torch.Tensor  # (B, K) bool
    middle: torch.Tensor  # (B, K, 2) middle of the visible part, x and y
    center: torch.Tensor  # (B, K, 2) projected centre of the whole object
    reach: torch.Tensor  # (B, K) radius of a disc of the visible part's area
    depth: torch.Tensor  # (B, K) metres
    attributes: dict[str, torch.Tensor]  # (B, K) int64 each: shape, color, size, material

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: torch.Tensor) -> Pool:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        attributes = {name: values[rows] for name, values in fields.pop("attributes").items()}
        return Pool(**{name: values[rows] for name, values in fields.items()}, attributes=attributes)


def build_pool(
    batch: scenes.Scenes,
    device: torch.device | str,
    compile: bool = False,
    size: int = 256,
    oversample: int = 2,
    progress: Callable[[int], object] = lambda count: None,
) -> Pool:
    """Render scenes and note what each object shows; `progress` hears how many pictures are done since last told."""
    images, seen = [], []
    for part in scenes.stream(batch, size, device, oversample, compile):
        images.append(part.image)
        seen.append(_visible(part.mask))
        progress(len(part.image))
    projected = geometry.project(batch, batch.position).to(device)
    middle, area = (torch.cat(parts) for parts in zip(*seen, strict=True))
    slots = torch.arange(batch.shape.shape[1])
    return Pool(
        images=torch.cat(images),
        present=(slots[None] < batch.count[:, None]).to(device),
        middle=middle,
        center=projected[..., :2],
        reach=(area / torch.pi).sqrt(),
        depth=projected[..., 2],
        attributes={name: getattr(batch, name).to(device) for name in ("shape", "color", "size", "material")},
    )


def _visible(mask: torch.Tensor, slots: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle (B, K, 2) and share of the picture (B, K) of each slot in masks (B, H, W)."""
    height, width = mask.shape[1:]
    each = (mask[:, None] == torch.arange(slots, device=mask.device)[None, :, None, None]).float()
    area = each.sum((2, 3))
    x = (torch.arange(width, device=mask.device) + 0.5) / width
    y = (torch.arange(height, device=mask.device) + 0.5) / height
    middle = torch.stack([(each.sum(2) * x).sum(-1), (each.sum(3) * y).sum(-1)], -1) / area.clamp(min=1)[..., None]
    return middle, area / (height * width)


@dataclasses.dataclass
class Targets:
    """What the maps should say. Cells are numbered row by row."""

    heat: torch.Tensor  # (B, h, w) in [0, 1], 1 at each object's cell
    cell: torch.Tensor  # (B, K) int64
    present: torch.Tensor  # (B, K) bool
    offset: torch.Tensor  # (B, K, 2) from the cell's corner to the projected centre, in cells
    depth: torch.Tensor  # (B, K)
    attributes: dict[str, torch.Tensor]


def targets(pool: Pool) -> Targets:
    """Target maps of a pool; call it on the batch that is trained on."""
    columns, rows = pool.images.shape[3] // STRIDE, pool.images.shape[2] // STRIDE
    size = torch.tensor([columns, rows], device=pool.images.device)
    corner = (pool.middle * size).floor().clamp(min=0)
    corner = torch.minimum(corner, size - 1)
    x, y = torch.arange(columns, device=size.device), torch.arange(rows, device=size.device)
    spread = (0.35 * pool.reach * columns).clamp(min=0.6)[..., None, None]
    dx, dy = x - corner[..., 0, None, None], y[:, None] - corner[..., 1, None, None]
    bump = torch.exp(-(dx**2 + dy**2) / (2 * spread**2)) * pool.present[..., None, None]
    return Targets(
        heat=bump.amax(1),
        cell=(corner[..., 1] * columns + corner[..., 0]).long(),
        present=pool.present,
        offset=pool.center * size - corner,
        depth=(pool.depth - DEPTH_MIDDLE) / DEPTH_SPREAD,
        attributes=pool.attributes,
    )


def flipped(pool: Pool) -> Pool:
    """The pool seen in a mirror."""
    mirror = lambda place: torch.stack([1 - place[..., 0], place[..., 1]], -1)  # noqa: E731
    return dataclasses.replace(pool, images=pool.images.flip(3), middle=mirror(pool.middle), center=mirror(pool.center))
