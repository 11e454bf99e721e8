"""Pictures, depth and masks of scenes, in chunks, on any device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch

from zoo.scenes import geometry, shade
from zoo.scenes.scene import Scenes

SKY_DEPTH = 100.0  # metres, stands for the sky in depth maps
SHADOW_RAYS = 16  # a pixel, shared out among its sub-pixels
CPU_RAYS = 1 << 14  # rays at a time on a CPU: what keeps the intermediate values in its cache
GPU_RAYS = 1 << 16  # rays at a time and scene on a GPU: a 256-pixel picture; larger ones reuse its compiled code


@dataclasses.dataclass
class Rendered:
    """Pictures and what is known of every pixel, on the device that drew them. B scenes of H x W pixels."""

    image: torch.Tensor  # (B, 3, H, W) uint8, sRGB
    depth: torch.Tensor  # (B, H, W) float32, metres along the optical axis at the pixel's centre, at most SKY_DEPTH
    mask: torch.Tensor  # (B, H, W) int8, slot of the object at the pixel's centre, or -1

    def cpu(self) -> Rendered:
        return Rendered(self.image.cpu(), self.depth.cpu(), self.mask.cpu())


def render(
    scenes: Scenes,
    size: int = 256,
    device: torch.device | str = "cpu",
    oversample: int = 2,
    compile: bool = False,
    chunk: int | None = None,
) -> Rendered:
    """Draw scenes as square pictures of `size` pixels.

    compile: fuse the arithmetic with torch.compile. Worth its minute or so for thousands of pictures on a GPU.
    chunk: scenes at a time; chosen for the device by default. Compiled code keeps one shape, a short last chunk is
    padded. Raises ValueError for a size or oversample below 1.
    """
    if size < 1 or oversample < 1:
        raise ValueError(f"size and oversample must be 1 or more, got {size} and {oversample}")
    parts = list(stream(scenes, size, device, oversample, compile, chunk))
    if not parts:
        empty = torch.zeros(0, size, size, device=device)
        return Rendered(torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device), empty, empty.to(torch.int8))
    return Rendered(*(torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Rendered)))


def stream(
    scenes: Scenes,
    size: int = 256,
    device: torch.device | str = "cpu",
    oversample: int = 2,
    compile: bool = False,
    chunk: int | None = None,
) -> Iterator[Rendered]:
    """As `render`, one chunk after another, for more pictures than fit in memory."""
    device = torch.device(device)
    sparse = device.type == "cpu" and not compile
    chunk = 1 if sparse else chunk or (32 if device.type == "cuda" else 4)
    for first in range(0, len(scenes), chunk):
        part = scenes[first : first + chunk]
        count = len(part)
        if compile and count < chunk:
            part = part[torch.arange(chunk).clamp(max=count - 1)]
        drawn = _draw(part, size, device, oversample, compile, sparse)
        yield Rendered(drawn.image[:count], drawn.depth[:count], drawn.mask[:count])


def geometry_maps(scenes: Scenes, size: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
    """Depth (B, H, W), mask (B, H, W) int8 and outward normals (B, 3, H, W) in the world's axes, at pixel centres.

    The sky's normal points at the viewer, as a wall's does.
    """
    w = shade.world(scenes, device)
    depth, slot, normal = _centres(w, *_grid(size, 0.0, 0.0, torch.device(device)))
    n = len(scenes)
    return depth.view(n, size, size), slot.view(n, size, size), normal.view(n, 3, size, size)


@torch.no_grad()
def _draw(part: Scenes, size: int, device: torch.device, oversample: int, compile: bool, sparse: bool) -> Rendered:
    if sparse:  # leave out object slots that no scene of the chunk uses
        part = _trim(part)
    w = shade.world(part, device)
    rays = CPU_RAYS if sparse else min(size * size, GPU_RAYS)
    points = shade.light_points(-(-SHADOW_RAYS // oversample**2) * oversample**2).to(device)
    image = torch.zeros(3, len(part), size * size, device=device)
    color = _compiled(_color, str(device)) if compile else _color
    for sub in range(oversample**2):
        dx, dy = ((sub % oversample + 0.5) / oversample - 0.5, (sub // oversample + 0.5) / oversample - 0.5)
        right, up = _grid(size, dx, dy, device)
        some = points[sub :: oversample**2].contiguous()
        for a in range(0, size * size, rays):
            image[..., a : a + rays] += color(w, right[a : a + rays], up[a : a + rays], some, sparse)
    image = (image / oversample**2 * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    centres = _compiled(_centres, str(device)) if compile else _centres
    right, up = _grid(size, 0.0, 0.0, device)
    found = [centres(w, right[a : a + rays], up[a : a + rays]) for a in range(0, size * size, rays)]
    depth, slot = (torch.cat([each[k] for each in found], -1) for k in (0, 1))
    n = len(part)
    shape = (n, size, size)
    return Rendered(image.movedim(1, 0).reshape(n, 3, size, size), depth.view(shape), slot.view(shape))


def _trim(part: Scenes) -> Scenes:
    used = int(part.count.max())
    names = ("shape", "color", "size", "material", "position", "yaw", "rgb")
    return dataclasses.replace(part, **{name: getattr(part, name)[:, :used] for name in names})


def _grid(size: int, dx: float, dy: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Picture coordinates in [-1, 1] of all pixels, moved by a part of a pixel: two (H * W,) tensors, right and up."""
    at = torch.arange(size, device=device, dtype=torch.float32) + 0.5
    right, down = (at + dx) * (2 / size) - 1, (at + dy) * (2 / size) - 1
    return right.repeat(size), -down.repeat_interleave(size)


def _color(w: shade.World, right: torch.Tensor, up: torch.Tensor, points: torch.Tensor, sparse: bool) -> torch.Tensor:
    return shade.develop(shade.radiance(w, right, up, points, sparse))


def _centres(w: shade.World, right: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth, slot and normal through picture points: (B, P), (B, P) int8, (B, 3, P)."""
    origin, direction = geometry.camera_rays(w.camera, right, up)
    hit = geometry.trace(w.solids, origin, direction)
    floor = torch.where(direction[1] < -1e-5, -origin[1] / direction[1].clamp(max=-1e-5), SKY_DEPTH)
    wall = torch.where(w.walled & (direction[2] > 1e-5), w.wall_z / direction[2].clamp(min=1e-5), SKY_DEPTH)
    behind = torch.minimum(floor, wall)
    depth = torch.minimum(hit.distance, behind)
    on_object = (hit.slot >= 0) & (hit.distance < behind)
    on_floor, sky = floor < wall, behind >= SKY_DEPTH
    zero = torch.zeros_like(depth)
    upright = sky | ~on_floor  # the wall, and the sky, which is given the normal of a wall
    flat = (zero, torch.where(upright, zero, 1.0), torch.where(upright, -1.0, zero))
    normal = torch.stack([torch.where(on_object, a, b) for a, b in zip(hit.normal, flat, strict=True)], 1)
    return depth.clamp(max=SKY_DEPTH), torch.where(on_object, hit.slot, -1).to(torch.int8), normal


@functools.cache
def _compiled(function, device: str):
    """One compiled form a function and device; shapes are static, so a new size compiles once more."""
    return torch.compile(function, dynamic=False)
