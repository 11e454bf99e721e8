"""Draw scenes: which objects, where, on what floor, in what light.

Random numbers come from a hash of (seed, split, scene, stream, attempt), not from a running generator. So scene i of a
seed is always the same, however many are drawn and in whatever pieces.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from zoo.scenes import geometry, lexicon

SPLITS = ("train", "test")
MAX_OBJECTS = 3
MIN_VISIBLE = 0.45
HELD_OUT = 16  # one set of two or three objects in this many belongs to the test split alone
_ATTRIBUTES, _PLACES, _LOOKS, _OFFSET = 1, 2, 3, 0.5


@dataclasses.dataclass
class Scenes:
    """A batch of scenes as CPU tensors. B scenes, K = 3 object slots (`count` of them in use). Units: about a metre.

    x points right, y up, z away from the camera; objects stand on the floor y = 0.
    """

    seed: int
    split: str
    index: torch.Tensor  # (B,) int64, position of the scene in its seed and split
    count: torch.Tensor  # (B,) int64, 1..3
    shape: torch.Tensor  # (B, K) int64 into lexicon.SHAPES, and so on for the next three
    color: torch.Tensor
    size: torch.Tensor
    material: torch.Tensor
    position: torch.Tensor  # (B, K, 3) float32, centre of each object
    yaw: torch.Tensor  # (B, K) float32, turn about the vertical axis in radians
    rgb: torch.Tensor  # (B, K, 3) float32, linear reflectance
    floor: torch.Tensor  # (B,) int64 into FLOORS
    pattern: torch.Tensor  # (B,) int64 into PATTERNS
    floor_rgb: torch.Tensor  # (B, 3)
    walled: torch.Tensor  # (B,) bool: a back wall in place of the open sky
    wall: torch.Tensor  # (B,) int64 into WALLS
    wall_rgb: torch.Tensor  # (B, 3)
    wall_z: torch.Tensor  # (B,) distance of the wall
    sky: torch.Tensor  # (B,) int64 into SKIES
    horizon_rgb: torch.Tensor  # (B, 3)
    zenith_rgb: torch.Tensor  # (B, 3)
    light: torch.Tensor  # (B, 3) unit vector towards the light
    light_rgb: torch.Tensor  # (B, 3)
    light_radius: torch.Tensor  # (B,) tangent of the light's angular radius
    camera: torch.Tensor  # (B, 3): height, downward pitch in radians, tangent of half the field of view

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, key: slice | torch.Tensor | list[int]) -> Scenes:
        """Scenes of a slice, a list of positions or a mask; one position gives a batch of one."""
        if isinstance(key, int):
            key = slice(key, key + 1) if key != -1 else slice(-1, None)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Scenes(**{name: v[key] if isinstance(v, torch.Tensor) else v for name, v in fields.items()})


def sample(n: int, seed: int, split: str = "train", start: int = 0) -> Scenes:
    """Draw scenes `start` to `start + n` of a seed and split.

    The splits differ in what they show, not only in their random numbers: a set of two or three objects (their shapes,
    colours, sizes and materials) occurs in one split only. Single objects, 128 kinds in all, occur in both.

    Raises ValueError for an unknown split or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if n < 0 or start < 0:
        raise ValueError(f"n and start must be 0 or more, got n={n}, start={start}")
    index = np.arange(start, start + n, dtype=np.int64)
    scenes = _looks(seed, split, index, _attributes(seed, split, index))
    _place(scenes)
    return scenes


def _uniform(
    seed: int, split: str, index: np.ndarray, stream: int, attempt: int | np.ndarray, width: int
) -> np.ndarray:
    """Uniform numbers in [0, 1), (len(index), width), by the SplitMix64 finaliser; `attempt` may differ by scene."""
    state = np.full((len(index), 1), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    tried = np.asarray(attempt).reshape(-1, 1)
    for part in (SPLITS.index(split), stream, tried, index[:, None], np.arange(width)[None]):
        step = np.atleast_1d(np.asarray(part, dtype=np.uint64)) + np.uint64(1)
        state = _mix(state + step * np.uint64(0x9E3779B97F4A7C15))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def object_set(shape: np.ndarray, color: np.ndarray, size: np.ndarray, material: np.ndarray, count: np.ndarray):
    """One integer a scene for its set of objects, whatever their order. (B, K) x 4, (B,) -> (B,) int64."""
    kind = ((shape * len(lexicon.COLORS) + color) * 2 + size) * 2 + material + 1
    kind = np.sort(np.where(np.arange(MAX_OBJECTS)[None] < count[:, None], kind, 0), axis=1)
    return (kind[:, 0] * 129 + kind[:, 1]) * 129 + kind[:, 2]


def is_held_out(sets: np.ndarray) -> np.ndarray:
    """Whether each set of objects (see `object_set`) belongs to the test split."""
    return _mix(sets.astype(np.uint64) + np.uint64(0x51ED27)) % np.uint64(HELD_OUT) == 0


def _attributes(seed: int, split: str, index: np.ndarray) -> dict[str, np.ndarray]:
    """Count, shapes, colours, sizes and materials; no two objects of a scene share both colour and shape."""
    n, k = len(index), MAX_OBJECTS
    # The count comes first and is kept, so that the choice of a held-out set does not change how many there are.
    count = np.searchsorted([0.25, 0.70], _uniform(seed, split, index, _ATTRIBUTES, 0, 1)[:, 0], side="right") + 1
    out = {name: np.zeros((n, k), np.int64) for name in ("shape", "color", "size", "material")}
    left = np.arange(n)
    for attempt in range(1, 5000):
        if not len(left):
            return {"count": count, **out}
        u = _uniform(seed, split, index[left], _ATTRIBUTES, attempt, 4 * k).reshape(-1, 4, k)
        draw = {name: (u[:, i] * m).astype(np.int64) for i, (name, m) in enumerate(zip(out, (4, 8, 2, 2), strict=True))}
        good = _distinct(draw, count[left])
        held = is_held_out(object_set(**draw, count=count[left]))
        good &= (count[left] == 1) | (held == (split == "test"))
        for name in out:
            out[name][left[good]] = draw[name][good]
        left = left[~good]
    raise RuntimeError("no set of objects was found: the hash that divides the splits is broken")


def _distinct(draw: dict[str, np.ndarray], count: np.ndarray) -> np.ndarray:
    look = draw["shape"] * len(lexicon.COLORS) + draw["color"]
    same01 = (look[:, 0] == look[:, 1]) & (count >= 2)
    same2 = ((look[:, 0] == look[:, 2]) | (look[:, 1] == look[:, 2])) & (count >= 3)
    return ~(same01 | same2)


def _pick(table: tuple, choice: np.ndarray) -> np.ndarray:
    return np.asarray(table, dtype=np.float64)[choice]


def _looks(seed: int, split: str, index: np.ndarray, objects: dict[str, np.ndarray]) -> Scenes:
    """Everything but the places: colours with a little variation, surroundings, light, camera."""
    n, k = len(index), MAX_OBJECTS
    u = _uniform(seed, split, index, _LOOKS, 0, 64)
    spread = lambda column, low, high: low + (high - low) * u[:, column]  # noqa: E731
    choose = lambda column, table: (u[:, column] * len(table)).astype(np.int64)  # noqa: E731
    tint = lambda column, amount: 1 + amount * (2 * u[:, column : column + 3] - 1)  # noqa: E731

    floor, wall, sky = choose(0, lexicon.FLOORS), choose(1, lexicon.WALLS), choose(2, lexicon.SKIES)
    azimuth = np.where(u[:, 4] < 0.5, -1, 1) * spread(5, 0.35, 1.25)  # from the left or the right, before the objects
    elevation = spread(6, 0.62, 1.02)
    light = np.stack([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), -np.cos(azimuth) * np.cos(elevation)], 1)
    warmth = spread(7, -1, 1)
    light_rgb = np.stack([1 + 0.10 * warmth, np.ones(n), 1 - 0.14 * warmth], 1) * spread(8, 2.0, 2.6)[:, None]
    height = spread(9, 2.1, 2.9)
    pitch = np.arctan2(height - spread(10, 0.70, 0.90), 7.8)  # aims a little above the middle of the objects
    bright = spread(11, 0.85, 1.15)[:, None]
    rgb = _pick(lexicon.COLOR_RGB, objects["color"]) * (1 + 0.12 * (2 * u[:, 20:29].reshape(n, k, 3) - 1))
    rgb = rgb * (1 + 0.10 * (2 * u[:, 29:32, None] - 1))
    values = {
        **objects,
        "index": index,
        "position": np.zeros((n, k, 3)),
        "yaw": np.zeros((n, k)),
        "rgb": np.clip(rgb, 0, 0.92),
        "floor": floor,
        "pattern": (u[:, 3] < 0.22).astype(np.int64),
        "floor_rgb": np.clip(_pick(lexicon.FLOOR_RGB, floor) * bright * tint(32, 0.06), 0, 0.8),
        "walled": u[:, 12] < 0.45,
        "wall": wall,
        "wall_rgb": np.clip(_pick(lexicon.WALL_RGB, wall) * tint(35, 0.06) * spread(13, 0.85, 1.1)[:, None], 0, 0.85),
        "wall_z": spread(14, 11.0, 13.5),
        "sky": sky,
        "horizon_rgb": _pick(lexicon.SKY_HORIZON, sky) * tint(38, 0.05),
        "zenith_rgb": _pick(lexicon.SKY_ZENITH, sky) * tint(41, 0.07),
        "light": light,
        "light_rgb": light_rgb,
        "light_radius": spread(15, 0.07, 0.13),
        "camera": np.stack([height, pitch, np.tan(spread(16, 0.315, 0.345))], 1),
    }
    return Scenes(seed=seed, split=split, **{name: _tensor(v) for name, v in values.items()})


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32) if values.dtype == np.float64 else values)


def _place(scenes: Scenes) -> None:
    """Fill `position` and `yaw`: draw places until nothing touches, leaves the picture, hides or is ambiguous."""
    left, attempt = np.arange(len(scenes)), 0
    while len(left):
        # A few hard scenes are left at the end: try many arrangements of each at once and keep the first clear one.
        tries = max(1, min(64, 1024 // len(left)))
        part = scenes[torch.from_numpy(np.repeat(left, tries))]
        _draw_places(part, np.tile(np.arange(attempt, attempt + tries), len(left)))
        good = geometry.is_clear(part, MIN_VISIBLE).numpy().reshape(-1, tries)
        solved = good.any(1)
        first = torch.from_numpy((np.arange(len(left)) * tries + good.argmax(1))[solved])
        done = torch.from_numpy(left[solved])
        scenes.position[done], scenes.yaw[done] = part.position[first], part.yaw[first]
        left, attempt = left[~solved], attempt + tries
        if attempt > 100_000:
            raise RuntimeError(f"no clear arrangement was found for {len(left)} scenes")


def _draw_places(part: Scenes, attempt: np.ndarray) -> None:
    u = _uniform(part.seed, part.split, part.index.numpy(), _PLACES, attempt, 16)
    n, count = len(part), part.count.numpy()
    # Three objects: one each in the left, middle and right, or large ones would hardly ever fit.
    x, z = 1.2 * (np.argsort(u[:, 7:10], axis=1) - 1) + 0.9 * (2 * u[:, 0:3] - 1), 6.5 + 2.9 * u[:, 3:6]
    # Two objects: place the pair by its relation, or nearly all draws would fail the rule for an unambiguous one.
    beside = u[:, 6] < 0.5
    across = np.where(beside, 1.3 + 1.5 * u[:, 7], 1.1 * (2 * u[:, 7] - 1)) * np.where(u[:, 8] < 0.5, 1, -1)
    along = np.where(beside, 1.0 * (2 * u[:, 9] - 1), 1.2 + 1.4 * u[:, 9]) * np.where(u[:, 10] < 0.5, 1, -1)
    pair = (count == 2)[:, None]
    middle_x, middle_z = 0.7 * (2 * u[:, 11] - 1), 7.3 + 1.1 * u[:, 12]
    x[:, :2] = np.where(pair, np.stack([middle_x - across / 2, middle_x + across / 2], 1), x[:, :2])
    z[:, :2] = np.where(pair, np.stack([middle_z - along / 2, middle_z + along / 2], 1), z[:, :2])
    single = count == 1
    x[:, 0] = np.where(single, 1.0 * (2 * u[:, 0] - 1), x[:, 0])
    z[:, 0] = np.where(single, 6.7 + 1.9 * u[:, 3], z[:, 0])
    radius, factor = np.asarray(lexicon.RADIUS)[part.size.numpy()], np.asarray(lexicon.HEIGHT)[part.shape.numpy()]
    part.position = torch.from_numpy(np.stack([x, radius * factor / 2, z], 2).astype(np.float32))
    yaw = u[:, 13:16] * math.pi / 2
    assert part.yaw.shape == (n, MAX_OBJECTS)
    part.yaw = torch.from_numpy(np.where(part.shape.numpy() == 1, yaw, 0).astype(np.float32))
