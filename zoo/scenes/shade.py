"""Light: from rays to colours. Plain element-wise torch, so that a compiler can fuse it into few kernels.

Colours are (3, B, P) tensors of linear light. The sun is a disc: a point's share of it is the mean over shadow rays to
points of the disc, each softened a little, and the rays of a pixel's sub-pixels go to different points of it. So a
shadow's edge has as many steps as rays and shows neither noise nor bands.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from zoo.scenes import geometry
from zoo.scenes.geometry import FAR, Camera, Hit, Solids, Vector, take
from zoo.scenes.scene import Scenes


class World(NamedTuple):
    """All that the renderer needs of B scenes. Colours are (3, B, 1), object colours (3, B, K), the rest (B, 1)."""

    solids: Solids
    camera: Camera
    rgb: torch.Tensor
    metal: torch.Tensor
    floor_rgb: torch.Tensor
    checkered: torch.Tensor
    walled: torch.Tensor
    wall_rgb: torch.Tensor
    wall_z: torch.Tensor
    horizon_rgb: torch.Tensor
    zenith_rgb: torch.Tensor
    light: Vector
    light_across: Vector
    light_up: Vector
    light_rgb: torch.Tensor


def world(scenes: Scenes, device: torch.device | str) -> World:
    """Move scenes to a device in the renderer's form."""
    x, y, z = (column[:, None] for column in scenes.light.unbind(1))
    flat = (x * x + z * z).sqrt()
    spread = scenes.light_radius[:, None]
    across, up = (z / flat, 0 * x, -x / flat), (-x * y / flat, flat, -z * y / flat)
    send = lambda tensors: tuple(t.to(device) for t in tensors)  # noqa: E731
    color = lambda rgb: rgb.T[..., None].contiguous().to(device)  # noqa: E731
    column = lambda values: values[:, None].to(device)  # noqa: E731
    return World(
        solids=geometry.solids(scenes, device),
        camera=geometry.camera(scenes, device),
        rgb=scenes.rgb.movedim(-1, 0).contiguous().to(device),
        metal=(scenes.material == 1).to(device),
        floor_rgb=color(scenes.floor_rgb),
        checkered=column(scenes.pattern == 1),
        walled=column(scenes.walled),
        wall_rgb=color(scenes.wall_rgb),
        wall_z=column(scenes.wall_z),
        horizon_rgb=color(scenes.horizon_rgb),
        zenith_rgb=color(scenes.zenith_rgb),
        light=send((x, y, z)),
        light_across=send(v * spread for v in across),
        light_up=send(v * spread for v in up),
        light_rgb=color(scenes.light_rgb),
    )


def light_points(total: int) -> torch.Tensor:
    """Evenly spread points of a disc, (total, 2), in a spiral: any regular part of them is spread evenly too."""
    k = torch.arange(total, dtype=torch.float32)
    radius, angle = ((k + 0.5) / total).sqrt(), k * (math.pi * (3 - math.sqrt(5)))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def dot(a: Vector, b: Vector) -> torch.Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def sunlight(w: World, point: Vector, points: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Share of the sun's disc that each point sees, (B, P). `points` (S, 2) are places on the disc."""
    total = 0.0
    for s in range(points.shape[0]):
        u, v = points[s, 0], points[s, 1]
        ray = tuple(a + u * b + v * c for a, b, c in zip(w.light, w.light_across, w.light_up, strict=True))
        near, far, _ = geometry.intervals(w.solids, point, ray)
        # A ray that only grazes a solid is blocked in part: this rounds the steps between the rays.
        blocked = ((far - near.clamp(min=0)) / (0.35 * w.solids.base[..., None])).clamp(0, 1)
        if skip is not None:
            slots = torch.arange(near.shape[1], device=near.device)[None, :, None]
            blocked = torch.where(slots == skip[:, None], 0.0, blocked)
        total = total + (1 - blocked).prod(1)
    return total / points.shape[0]


def sky(w: World, direction: Vector) -> torch.Tensor:
    """Colour of the sky, or of the bright room before a wall, (3, B, P), with a soft glow around the sun."""
    length = torch.rsqrt(dot(direction, direction))
    rise = (direction[1] * length).clamp(0, 1)
    blend = 1 - (1 - rise) ** 6
    color = w.horizon_rgb + (w.zenith_rgb - w.horizon_rgb) * blend
    room = w.wall_rgb * 0.40 + 0.14 + 0.62 * blend
    toward = (dot(direction, w.light) * length).clamp(min=0)
    return torch.where(w.walled, room, 1.12 * color) + w.light_rgb * (0.9 * toward**48 + 0.10 * toward**6)


def ambient(w: World, up: torch.Tensor) -> torch.Tensor:
    """Light from all around on a surface whose normal has this vertical part, (3, B, P): sky above, floor below."""
    above = torch.where(w.walled, w.wall_rgb * 0.35 + 0.42, 0.55 * w.horizon_rgb + 0.35 * w.zenith_rgb + 0.10)
    half = 0.5 + 0.5 * up
    return 0.66 * above * half + (0.55 * w.floor_rgb * w.light_rgb * w.light[1] + 0.05) * (1 - half)


def contact(w: World, point: Vector) -> torch.Tensor:
    """How much of the sky each solid hides from a point of the floor, (B, K, P), in closed form."""
    s = w.solids
    cos, sin, base = s.cos[..., None], s.sin[..., None], s.base[..., None]
    ox, oz = point[0][:, None] - s.x[..., None], point[2][:, None] - s.z[..., None]
    lx, lz = (cos * ox + sin * oz).abs() - base, (cos * oz - sin * ox).abs() - base
    square = (lx.clamp(min=0) ** 2 + lz.clamp(min=0) ** 2).sqrt()
    radius2 = ox * ox + oz * oz
    away = torch.where(s.cube[..., None], square, (radius2.sqrt() - base).clamp(min=0))
    side = 0.66 * (1 - away / (away * away + (0.6 * s.height[..., None]) ** 2).sqrt())
    ball = 0.92 * (1 + radius2 / (base * base)) ** -1.5
    hidden = torch.where(s.sphere[..., None], ball, side) * torch.exp(-2 * point[1].clamp(min=0))[:, None]
    return torch.where(s.present[..., None], hidden, 0.0)


def background(w: World, origin: Vector, direction: Vector, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour (3, B, P) and distance (B, P) of the floor, wall or sky along each ray; the distance is FAR for sky."""
    to_floor = torch.where(direction[1] < -1e-5, -origin[1] / direction[1].clamp(max=-1e-5), FAR)
    away = w.walled & (direction[2] > 1e-5)
    to_wall = torch.where(away, (w.wall_z - origin[2]) / direction[2].clamp(min=1e-5), FAR)
    on_wall = to_wall < to_floor
    distance = torch.minimum(to_floor, to_wall)
    point = tuple(o + distance.clamp(max=200) * d for o, d in zip(origin, direction, strict=True))
    normal_up = torch.where(on_wall, 0.0, 1.0)
    facing = torch.where(on_wall, -w.light[2], w.light[1])
    hidden = contact(w, point)
    open_sky = (1 - hidden).prod(1)
    open_sky = open_sky * torch.where(w.walled, _corner(w, point, on_wall), 1.0)
    sun = sunlight(w, point, points, None) * facing
    bounce = (w.rgb[..., None] * hidden[None]).sum(2) * 0.35
    albedo = torch.where(on_wall, w.wall_rgb, _floor(w, point, distance))
    lit = albedo * (w.light_rgb * sun + ambient(w, normal_up) * open_sky + bounce * w.light_rgb)
    # The light is aimed at the objects: the floor darkens away from them, which also gives mirrors something to show.
    lit = lit / (1 + (point[0] * point[0] + (point[2] - 7.5) ** 2) * 0.008)
    haze = torch.where(w.walled, 0.0, 1 - torch.exp(-((distance / 38) ** 2)))
    beyond = sky(w, direction)
    lit = lit + (beyond - lit) * haze
    return torch.where(distance < FAR, lit, beyond), distance


def _corner(w: World, point: Vector, on_wall: torch.Tensor) -> torch.Tensor:
    """Softly darker where floor and wall meet."""
    away = torch.where(on_wall, point[1], w.wall_z - point[2]).clamp(min=0)
    return 1 - 0.45 * torch.exp(-1.1 * away)


def _floor(w: World, point: Vector, distance: torch.Tensor) -> torch.Tensor:
    """Reflectance of the floor: plain, or a check that fades with distance before it could flicker."""
    wave = torch.sin(point[0] * math.pi / 0.9) * torch.sin(point[2] * math.pi / 0.9)
    sharp = (wave * (60 / distance.clamp(min=1))).clamp(-1, 1)
    check = torch.where(w.checkered, 0.20 * sharp * torch.exp(-((distance / 16) ** 2)), 0.0)
    return w.floor_rgb * (1 + check)


def surface(w: World, hit: Hit, point: Vector, points: torch.Tensor) -> torch.Tensor:
    """Diffuse light of the objects at their hit points, (3, B, P)."""
    nx, ny, nz = hit.normal
    facing = (nx * w.light[0] + ny * w.light[1] + nz * w.light[2]).clamp(min=0)
    sun = sunlight(w, point, points, hit.slot) * facing
    albedo = colors(w, hit.slot)
    near_floor = 1 - (0.28 - 0.34 * ny).clamp(min=0) * torch.exp(-4.5 * point[1].clamp(min=0))
    shade = ambient(w, ny) * (near_floor * _neighbours(w, hit, point))
    return albedo * (w.light_rgb * sun + shade)


def _neighbours(w: World, hit: Hit, point: Vector) -> torch.Tensor:
    """Share of the surroundings that the other objects leave open, each taken as a ball, (B, P)."""
    s = w.solids
    half = 0.5 * s.height[..., None]
    vx, vz = s.x[..., None] - point[0][:, None], s.z[..., None] - point[2][:, None]
    vy = half - point[1][:, None]
    square = vx * vx + vy * vy + vz * vz
    radius2 = (0.5 * (s.base[..., None] + half)) ** 2
    toward = (vx * hit.normal[0][:, None] + vy * hit.normal[1][:, None] + vz * hit.normal[2][:, None]).clamp(min=0)
    hidden = toward * torch.rsqrt(square) * radius2 / torch.maximum(square, radius2)
    other = torch.arange(s.x.shape[1], device=square.device)[None, :, None] != hit.slot[:, None]
    return (1 - 0.8 * torch.where(other & s.present[..., None], hidden, 0.0)).prod(1)


def colors(w: World, slot: torch.Tensor) -> torch.Tensor:
    """Reflectance of each ray's object, (3, B, P)."""
    return torch.stack([take(channel, slot) for channel in w.rgb.unbind(0)])


def mirror(w: World, hit: Hit, point: Vector, direction: Vector) -> torch.Tensor:
    """What a metal surface shows: one bounce, tinted with its colour and white at grazing angles, (3, B, P)."""
    length = torch.rsqrt(dot(direction, direction))
    view = tuple(d * length for d in direction)
    along = dot(view, hit.normal)
    ray = tuple(v - 2 * along * n for v, n in zip(view, hit.normal, strict=True))
    center = torch.zeros(1, 2, device=along.device)
    seen, distance = background(w, point, ray, center)
    other = geometry.trace(w.solids, point, ray, skip=hit.slot)
    there = tuple(p + other.distance.clamp(max=50) * r for p, r in zip(point, ray, strict=True))
    seen = torch.where(other.distance < distance, surface(w, other, there, center), seen)
    grazing = (1 + along).clamp(0, 1) ** 5
    tint = colors(w, hit.slot) * 0.88 + 0.02
    return seen * (tint + (0.9 - tint) * grazing)


def radiance(w: World, right: torch.Tensor, up: torch.Tensor, points: torch.Tensor, sparse: bool) -> torch.Tensor:
    """Light that reaches the camera through picture points (P,) in [-1, 1]: (3, B, P).

    `sparse` follows mirror rays for metal pixels alone, which a single scene on a CPU gains from; otherwise every pixel
    does the same work, which a compiler needs.
    """
    origin, direction = geometry.camera_rays(w.camera, right, up)
    hit = geometry.trace(w.solids, origin, direction)
    point = tuple(o + hit.distance.clamp(max=50) * d for o, d in zip(origin, direction, strict=True))
    behind, distance = background(w, origin, direction, points)
    color = surface(w, hit, point, points)
    metal = take(w.metal, hit.slot) & (hit.slot >= 0)
    if not sparse:
        color = torch.where(metal, 0.30 * color + mirror(w, hit, point, direction), color)
    elif metal.any():
        at = metal[0].nonzero().squeeze(1)
        some = Hit(hit.distance[:, at], hit.slot[:, at], tuple(n[:, at] for n in hit.normal))
        shown = mirror(w, some, tuple(p[:, at] for p in point), tuple(d[:, at] for d in direction))
        color[:, :, at] = 0.30 * color[:, :, at] + shown
    color = color + _highlight(w, hit, direction, metal)
    vignette = 1 - 0.11 * (right * right + up * up)
    return torch.where((hit.slot >= 0) & (hit.distance < distance), color, behind) * vignette


def _highlight(w: World, hit: Hit, direction: Vector, metal: torch.Tensor) -> torch.Tensor:
    """The sun's own reflection: small and bright on metal, wide and faint on a matte surface."""
    length = torch.rsqrt(dot(direction, direction))
    middle = tuple(light - d * length for light, d in zip(w.light, direction, strict=True))
    cosine = (dot(middle, hit.normal) * torch.rsqrt(dot(middle, middle).clamp(min=1e-6))).clamp(0, 1)
    return w.light_rgb * torch.where(metal, 0.55 * cosine**90, 0.025 * cosine**10)


def develop(light: torch.Tensor) -> torch.Tensor:
    """Linear light to display values in [0, 1]: a soft shoulder for highlights, the sRGB curve, a little contrast."""
    x = light.clamp(min=0) * 0.82
    x = x * (1 + x / 5) / (1 + 0.70 * x)
    x = x.clamp(0, 1)
    x = torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp(min=1e-6) ** (1 / 2.4) - 0.055)
    return x + 0.30 * (x * x * (3 - 2 * x) - x)
