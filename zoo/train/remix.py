"""Scenes made from scenes, for learning to vary pictures and to mix them.

A variation shows the same objects a little elsewhere, under other light, from another height. A mix is undone: the
objects of a scene are dealt out to two scenes with surroundings of their own; the scene itself is what the two make.
Random numbers come from a torch generator of the CPU. B scenes, K = 3 object slots.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from zoo.scenes import Scenes, geometry

SLOTS = ("shape", "color", "size", "material", "position", "yaw", "rgb")
SURROUNDINGS = (
    "floor",
    "pattern",
    "floor_rgb",
    "walled",
    "wall",
    "wall_rgb",
    "wall_z",
    "sky",
    "horizon_rgb",
    "zenith_rgb",
)


def fits(scenes: Scenes) -> torch.Tensor:
    """Whether objects stand apart and inside the picture, (B,) bool. Cheaper than geometry.is_clear: no rays."""
    s, box = geometry.solids(scenes), geometry.boxes(scenes)
    inside = (box[..., :2].amin(-1) > 0.01) & (box[..., 2:].amax(-1) < 0.99)
    reach = torch.where(s.cube, s.base * 1.4143, s.base)
    gap = ((s.x[:, :, None] - s.x[:, None]) ** 2 + (s.z[:, :, None] - s.z[:, None]) ** 2).sqrt()
    pair = s.present[:, :, None] & s.present[:, None] & ~torch.eye(s.x.shape[1], dtype=torch.bool)
    apart = gap > reach[:, :, None] + reach[:, None] + 0.08
    return (inside | ~s.present).all(1) & (apart | ~pair).flatten(1).all(1)


def _between(shape: tuple[int, ...], low: float, high: float, g: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=g)


def moved(scenes: Scenes, g: torch.Generator, reach: float = 0.35) -> Scenes:
    """Variations: objects up to `reach` metres away and turned anew, another camera height and light.

    Where the objects do not fit they go less far, at last nowhere.
    """
    near = dataclasses.replace(scenes)
    for part in (0.25, 0.5, 1.0):
        tried = _moved(scenes, g, part * reach)
        near = _where(fits(tried), tried, near)
    return near


def _moved(scenes: Scenes, g: torch.Generator, reach: float) -> Scenes:
    n, k = scenes.yaw.shape
    position = scenes.position.clone()
    position[..., 0] += _between((n, k), -reach, reach, g)
    position[..., 2] += _between((n, k), -reach, reach, g)
    yaw = torch.where(scenes.shape == 1, _between((n, k), 0, math.pi / 2, g), 0)
    camera = scenes.camera.clone()
    camera[:, 0] *= _between((n,), 0.95, 1.05, g)
    camera[:, 1] += _between((n,), -0.02, 0.02, g)
    light, turn = scenes.light.clone(), _between((n,), -0.5, 0.5, g)
    light[:, 0] = turn.cos() * scenes.light[:, 0] + turn.sin() * scenes.light[:, 2]
    light[:, 2] = turn.cos() * scenes.light[:, 2] - turn.sin() * scenes.light[:, 0]
    rgb = (scenes.rgb * _between((n, k, 3), 0.95, 1.05, g)).clamp(0, 0.92)
    return dataclasses.replace(scenes, position=position, yaw=yaw, camera=camera, light=light, rgb=rgb)


def _where(good: torch.Tensor, new: Scenes, old: Scenes) -> Scenes:
    pick = lambda a, b: torch.where(good.view(-1, *([1] * (a.ndim - 1))), a, b)  # noqa: E731
    fields = {
        name: pick(getattr(new, name), getattr(old, name)) for name in ("position", "yaw", "camera", "light", "rgb")
    }
    return dataclasses.replace(new, **fields)


def deal(scenes: Scenes, g: torch.Generator) -> tuple[Scenes, Scenes]:
    """Two scenes that share out the objects of scenes with two or three; one has the surroundings of another scene.

    Each is moved, and a lone object stands, every other time, where lone objects do. Raises ValueError for scenes of
    one object.
    """
    if int(scenes.count.min()) < 2:
        raise ValueError("a scene of one object cannot be dealt out")
    n, k = scenes.yaw.shape
    order = torch.rand(n, k, generator=g).masked_fill(torch.arange(k)[None] >= scenes.count[:, None], 2.0).argsort(1)
    first = torch.where(scenes.count == 2, 1, torch.randint(1, 3, (n,), generator=g))
    one = _with_slots(scenes, order, first)
    rest = order.gather(1, (torch.arange(k)[None] + first[:, None]).clamp(max=k - 1))
    two = _with_slots(scenes, rest, scenes.count - first)
    other = {name: getattr(scenes, name).roll(1, 0) for name in SURROUNDINGS}
    two = dataclasses.replace(two, **other)
    return tuple(moved(_alone(part, g), g) for part in (one, two))


def _with_slots(scenes: Scenes, order: torch.Tensor, count: torch.Tensor) -> Scenes:
    """Scenes with their slots in another order (B, K), the first `count` of them in use."""
    fields = {}
    for name in SLOTS:
        value = getattr(scenes, name)
        index = order.view(*order.shape, *([1] * (value.ndim - 2))).expand(-1, -1, *value.shape[2:])
        fields[name] = value.gather(1, index)
    return dataclasses.replace(scenes, count=count, **fields)


def _alone(scenes: Scenes, g: torch.Generator) -> Scenes:
    """Put every other lone object where scenes of one object have theirs."""
    n = len(scenes)
    there = torch.stack([_between((n,), -1.0, 1.0, g), _between((n,), 6.7, 8.6, g)], 1)
    pick = ((scenes.count == 1) & (torch.rand(n, generator=g) < 0.5))[:, None]
    position = scenes.position.clone()
    position[:, 0, 0::2] = torch.where(pick, there, position[:, 0, 0::2])
    return dataclasses.replace(scenes, position=position)
