"""Rays, solids, projection and visibility.

Every solid is convex and is met by one formula: the part of a ray between the floor and the solid's height, cut with
its part inside an upright quadric x^2 + z^2 + c2 y^2 + c1 y + c0 <= 0 (sphere, cylinder, cone) or a square (cube).
Points and directions are tuples of three tensors; shapes: B scenes, K object slots, P rays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from zoo.scenes import lexicon

if TYPE_CHECKING:
    from zoo.scenes.scene import Scenes

Vector = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FAR = 1.0e4  # stands for "no hit" along a ray

# What makes a relation unambiguous: metres in the scene, and a share of the picture's width.
RELATION_ACROSS, RELATION_ALONG, RELATION_WIDTH = 0.9, 1.0, 0.10


class Solids(NamedTuple):
    """The objects of B scenes in the renderer's terms; each field is (B, K)."""

    present: torch.Tensor
    x: torch.Tensor
    z: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    base: torch.Tensor  # base radius, or half the side of a cube
    height: torch.Tensor
    cube: torch.Tensor
    sphere: torch.Tensor
    c2: torch.Tensor
    c1: torch.Tensor
    c0: torch.Tensor


class Camera(NamedTuple):
    """A level camera at (0, height, 0) that looks along +z, tilted down; each field is (B, 1)."""

    height: torch.Tensor
    sin: torch.Tensor
    cos: torch.Tensor
    tan_half: torch.Tensor


def solids(scenes: Scenes, device: torch.device | str = "cpu") -> Solids:
    """Turn the scenes' objects into the numbers of the ray formula."""
    shape, size = scenes.shape, scenes.size
    table = lambda values: torch.tensor(values, dtype=torch.float32)  # noqa: E731
    radius = table(lexicon.RADIUS)[size]
    base, height = radius * table(lexicon.FOOTPRINT)[shape], radius * table(lexicon.HEIGHT)[shape]
    slope2 = (base / height) ** 2
    zero = torch.zeros_like(base)
    c2 = torch.stack([zero + 1, zero, zero, -slope2])
    c1 = torch.stack([-2 * base, zero, zero, 2 * slope2 * height])
    c0 = torch.stack([zero, zero, -(base**2), -slope2 * height**2])
    pick = lambda stack: stack.gather(0, shape[None]).squeeze(0)  # noqa: E731
    present = torch.arange(shape.shape[1])[None] < scenes.count[:, None]
    position = scenes.position
    fields = (present, position[..., 0], position[..., 2], scenes.yaw.cos(), scenes.yaw.sin(), base, height)
    fields += (shape == 1, shape == 0, pick(c2), pick(c1), pick(c0))
    return Solids(*(f.to(device) for f in fields))


def camera(scenes: Scenes, device: torch.device | str = "cpu") -> Camera:
    height, pitch, tan_half = (column[:, None].to(device) for column in scenes.camera.unbind(1))
    return Camera(height, pitch.sin(), pitch.cos(), tan_half)


def camera_rays(cam: Camera, right: torch.Tensor, up: torch.Tensor) -> tuple[Vector, Vector]:
    """Origins (B, 1) and directions (B, P) of rays through picture points in [-1, 1].

    A direction's part along the optical axis is 1, so the distance along a ray is the depth that a depth camera reads.
    """
    right, up = right * cam.tan_half, up * cam.tan_half
    zero = torch.zeros_like(cam.height)
    return (zero, cam.height, zero), (right, up * cam.cos - cam.sin, cam.cos + up * cam.sin)


def project(scenes: Scenes, points: torch.Tensor) -> torch.Tensor:
    """Picture coordinates of world points: (B, N, 3) -> (B, N, 3) as x and y in [0, 1] from the top left, and depth."""
    height, pitch, tan_half = (column[:, None] for column in scenes.camera.unbind(1))
    x, y, z = points[..., 0], points[..., 1] - height, points[..., 2]
    depth = z * pitch.cos() - y * pitch.sin()
    up = (z * pitch.sin() + y * pitch.cos()) / depth / tan_half
    return torch.stack([(1 + x / depth / tan_half) / 2, (1 - up) / 2, depth], -1)


def _local(s: Solids, origin: Vector, direction: Vector) -> tuple[Vector, Vector]:
    """Into each solid's own axes, (B, P) -> (B, K, P)."""
    cos, sin = s.cos[..., None], s.sin[..., None]
    ox, oz = origin[0][:, None] - s.x[..., None], origin[2][:, None] - s.z[..., None]
    dx, dz = direction[0][:, None], direction[2][:, None]
    moved = (cos * ox + sin * oz, origin[1][:, None], cos * oz - sin * ox)
    return moved, (cos * dx + sin * dz, direction[1][:, None], cos * dz - sin * dx)


def _safe(x: torch.Tensor) -> torch.Tensor:
    """Keep a divisor away from zero without changing its sign."""
    return torch.where(x.abs() < 1e-7, torch.full_like(x, 1e-7), x)


def _slab(o: torch.Tensor, d: torch.Tensor, low, high) -> tuple[torch.Tensor, torch.Tensor]:
    inverse = 1 / _safe(d)
    a, b = (low - o) * inverse, (high - o) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def intervals(s: Solids, origin: Vector, direction: Vector) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each ray is inside each solid: (B, K, P) near, far, and whether it enters through the top or bottom.

    near > far where the ray misses. Solids that are not present are missed by every ray.
    """
    (ox, oy, oz), (dx, dy, dz) = _local(s, origin, direction)
    low, high = _slab(oy, dy, 0.0, s.height[..., None])
    side_near, side_far = _quadric(s, (ox, oy, oz), (dx, dy, dz))
    base = s.base[..., None]
    x_near, x_far = _slab(ox, dx, -base, base)
    z_near, z_far = _slab(oz, dz, -base, base)
    cube = s.cube[..., None]
    side_near = torch.where(cube, torch.maximum(x_near, z_near), side_near)
    side_far = torch.where(cube, torch.minimum(x_far, z_far), side_far)
    near = torch.where(s.present[..., None], torch.maximum(side_near, low), FAR)
    return near, torch.minimum(side_far, high), low > side_near


def _quadric(s: Solids, o: Vector, d: Vector) -> tuple[torch.Tensor, torch.Tensor]:
    """Entry and exit of the quadric; for a cone seen steeply, those of the lower of its two halves."""
    c2, c1, c0 = s.c2[..., None], s.c1[..., None], s.c0[..., None]
    (ox, oy, oz), (dx, dy, dz) = o, d
    a = _safe(dx * dx + dz * dz + c2 * dy * dy)
    b = ox * dx + oz * dz + c2 * oy * dy + 0.5 * c1 * dy
    c = ox * ox + oz * oz + (c2 * oy + c1) * oy + c0
    disc = b * b - a * c
    root, inverse = disc.clamp(min=0).sqrt(), 1 / a
    first, second = (-b - root) * inverse, (-b + root) * inverse
    steep, down = a < 0, dy < 0
    far_value = torch.full_like(first, FAR)
    near = torch.where(disc < 0, far_value, torch.where(steep, torch.where(down, first, -far_value), first))
    far = torch.where(steep, torch.where(down, far_value, second), second)
    return near, far


class Hit(NamedTuple):
    """The nearest solid of each ray: distance (FAR for none), slot (-1 for none), outward normal; each (B, P)."""

    distance: torch.Tensor
    slot: torch.Tensor
    normal: Vector


def trace(s: Solids, origin: Vector, direction: Vector, skip: torch.Tensor | None = None) -> Hit:
    """Nearest solid along each ray; `skip` (B, P) names a slot to leave out, the one that the ray starts from."""
    near, far, cap = intervals(s, origin, direction)
    hit = (near < far) & (near > 1e-3)
    if skip is not None:
        hit = hit & (torch.arange(near.shape[1], device=near.device)[None, :, None] != skip[:, None])
    near = torch.where(hit, near, FAR)
    distance, best = near[:, 0], torch.zeros_like(near[:, 0], dtype=torch.int64)
    through_cap = cap[:, 0]
    for k in range(1, near.shape[1]):
        closer = near[:, k] < distance
        distance, best = torch.where(closer, near[:, k], distance), torch.where(closer, k, best)
        through_cap = torch.where(closer, cap[:, k], through_cap)
    found = distance < FAR
    t = torch.where(found, distance, 1.0)
    normal = _normal(s, best, tuple(o + t * d for o, d in zip(origin, direction, strict=True)), through_cap)
    return Hit(distance, torch.where(found, best, -1), normal)


def take(values: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """The value of each ray's solid: (B, K), (B, P) -> (B, P); a slot of -1 reads slot 0."""
    return values.gather(1, slot.clamp(min=0))


def _normal(s: Solids, slot: torch.Tensor, point: Vector, cap: torch.Tensor) -> Vector:
    cos, sin = take(s.cos, slot), take(s.sin, slot)
    ox, oz = point[0] - take(s.x, slot), point[2] - take(s.z, slot)
    lx, lz = cos * ox + sin * oz, cos * oz - sin * ox
    cube = take(s.cube, slot)
    along_x = lx.abs() > lz.abs()
    nx = torch.where(cube, torch.where(along_x, lx.sign(), 0.0), lx)
    nz = torch.where(cube, torch.where(along_x, 0.0, lz.sign()), lz)
    ny = torch.where(cube, 0.0, take(s.c2, slot) * point[1] + 0.5 * take(s.c1, slot))
    nx, nz = torch.where(cap, 0.0, nx), torch.where(cap, 0.0, nz)
    top = torch.where(point[1] > 0.5 * take(s.height, slot), 1.0, -1.0)
    ny = torch.where(cap, top, ny)
    inverse = torch.rsqrt((nx * nx + ny * ny + nz * nz).clamp(min=1e-12))
    nx, ny, nz = nx * inverse, ny * inverse, nz * inverse
    return cos * nx - sin * nz, ny, sin * nx + cos * nz


def boxes(scenes: Scenes) -> torch.Tensor:
    """Picture rectangles that enclose the objects: (B, K, 4) as left, top, right, bottom in [0, 1]."""
    s = solids(scenes)
    reach = torch.where(s.cube, s.base * (s.cos.abs() + s.sin.abs()), s.base)
    corners = []
    for sx in (-1, 1):
        for sz in (-1, 1):
            for y in (0, 1):
                corners.append(torch.stack([s.x + sx * reach, s.height * y, s.z + sz * reach], -1))
    n, k = s.x.shape
    flat = project(scenes, torch.stack(corners, 2).reshape(n, k * 8, 3)).reshape(n, k, 8, 3)[..., :2]
    return torch.cat([flat.amin(2), flat.amax(2)], -1)


def relations(scenes: Scenes) -> torch.Tensor:
    """Which relations hold without doubt: (B, K, K, 4) bool, entry [b, i, j, r] = object i is RELATIONS[r] of j."""
    x, z = scenes.position[..., 0], scenes.position[..., 2]
    dx, dz = x[:, :, None] - x[:, None], z[:, :, None] - z[:, None]
    seen = project(scenes, scenes.position)[..., 0]
    shift = seen[:, :, None] - seen[:, None]
    across = (dx.abs() >= RELATION_ACROSS) & (dx.abs() >= dz.abs()) & (shift.abs() >= RELATION_WIDTH)
    across = across & (shift * dx > 0)
    along = (dz.abs() >= RELATION_ALONG) & (dz.abs() >= 1.25 * dx.abs())
    slots = torch.arange(x.shape[1])[None]
    present = slots < scenes.count[:, None]
    both = present[:, :, None] & present[:, None]
    holds = torch.stack([across & (dx < 0), across & (dx > 0), along & (dz < 0), along & (dz > 0)], -1)
    return holds & both[..., None]


def visibility(scenes: Scenes, grid: int = 14) -> torch.Tensor:
    """Share of each object's outline that no other object hides, (B, K), from grid x grid rays; 1 for empty slots."""
    s, cam = solids(scenes), camera(scenes)
    box = boxes(scenes)
    at = (torch.arange(grid) + 0.5) / grid
    left, top, right, bottom = box.unbind(-1)
    px = (left[..., None] + (right - left)[..., None] * at)[:, :, None, :].expand(-1, -1, grid, -1)
    py = (top[..., None] + (bottom - top)[..., None] * at)[:, :, :, None].expand(-1, -1, -1, grid)
    n, k = s.x.shape
    origin, direction = camera_rays(cam, px.reshape(n, -1) * 2 - 1, 1 - py.reshape(n, -1) * 2)
    near, far, _ = intervals(s, origin, direction)
    near = torch.where(near < far, near, FAR).reshape(n, k, k, grid * grid)  # [scene, solid, rectangle, ray]
    own = near.diagonal(dim1=1, dim2=2).movedim(-1, 1)
    outline, first = own < FAR, own <= near.amin(1)
    share = (outline & first).sum(-1) / outline.sum(-1).clamp(min=1)
    return torch.where(s.present, share, 1.0)


def is_clear(scenes: Scenes, min_visible: float) -> torch.Tensor:
    """Whether each scene can be used: (B,) bool. Cheap rules first; rays only where rectangles overlap.

    Inside the picture, apart from each other, each object at least `min_visible` in view, and at least count - 1 of
    the pairs in an unambiguous relation.
    """
    s, box = solids(scenes), boxes(scenes)
    absent = ~s.present
    inside = (box[..., :2].amin(-1) > 0.02) & (box[..., 2:].amax(-1) < 0.98)
    reach = torch.where(s.cube, s.base * 1.4143, s.base)
    gap = ((s.x[:, :, None] - s.x[:, None]) ** 2 + (s.z[:, :, None] - s.z[:, None]) ** 2).sqrt()
    pair = s.present[:, :, None] & s.present[:, None] & ~torch.eye(s.x.shape[1], dtype=torch.bool)
    apart = gap > reach[:, :, None] + reach[:, None] + 0.12
    related = (relations(scenes).any(-1).sum((1, 2)) // 2) >= scenes.count - 1
    good = (inside | absent).all(1) & (apart | ~pair).all(2).all(1) & related
    meet = (box[:, :, None, :2] < box[:, None, :, 2:]).all(-1)
    overlap = (meet & meet.transpose(1, 2) & pair).flatten(1).any(1)
    test = (good & overlap).nonzero().squeeze(1)
    if len(test):
        good[test] = (visibility(scenes[test]) >= min_visible + 0.02).all(1)
    return good
