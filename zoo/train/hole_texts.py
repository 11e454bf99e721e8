"""What a prompt says of a hole: the object that shall appear in it, or empty surroundings. As tables of token ids."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import torch

from zoo import scenes
from zoo.scenes.lexicon import COLORS, FLOOR_WORDS, FLOORS, SHAPES, SKIES, SKY_WORDS, WALL_WORDS, WALLS, words
from zoo.train import vocab as tokens
from zoo.train.captions import augment

OBJECTS = len(SHAPES) * len(COLORS) * 4  # x sizes x materials
PLACES = len(FLOORS) * 2 * (len(WALLS) + len(SKIES))
_AROUND = {"floor", "ground", "wall", "sky"}


def object_row(drawn: scenes.Scenes, slot: torch.Tensor) -> torch.Tensor:
    """Table row of one object of each scene: slot (B,) -> (B,)."""
    rows = torch.arange(len(drawn))
    shape, color, size, material = (getattr(drawn, n)[rows, slot] for n in ("shape", "color", "size", "material"))
    return ((shape * len(COLORS) + color) * 2 + size) * 2 + material


def place_row(drawn: scenes.Scenes) -> torch.Tensor:
    """Table row of each scene's surroundings, (B,)."""
    back = torch.where(drawn.walled, drawn.wall, len(WALLS) + drawn.sky)
    return OBJECTS + (drawn.floor * 2 + drawn.pattern) * (len(WALLS) + len(SKIES)) + back


def one_object(rows: list[int]) -> scenes.Scenes:
    """Scenes that hold one object each, of the kinds given by their table rows."""
    drawn = scenes.sample(len(rows), seed=11)
    row = torch.tensor(rows)
    fields = {"material": row % 2, "size": row // 2 % 2, "color": row // 4 % len(COLORS)}
    fields["shape"] = row // 4 // len(COLORS)
    changed = {}
    for name, values in fields.items():
        changed[name] = getattr(drawn, name).clone()
        changed[name][:, 0] = values
    return dataclasses.replace(drawn, count=torch.ones_like(drawn.count), **changed)


def object_texts(versions: int) -> list[list[str]]:
    """For each kind of object, `versions` ways to name it alone, without its surroundings."""
    kinds = list(range(OBJECTS))
    drawn, found = one_object(kinds), [[] for _ in kinds]
    for seed in range(100 * versions):
        short = [i for i in kinds if len(found[i]) < versions]
        if not short:
            break
        for i, text in zip(short, scenes.captions(drawn[torch.tensor(short)], seed), strict=True):
            if not _AROUND & set(words(text)):
                found[i].append(text)
    return found


def place_texts(versions: int, rng: random.Random) -> list[list[str]]:
    """For each kind of surroundings, ways to ask for them with nothing in them."""
    result = []
    for floor in range(len(FLOORS)):
        for pattern in range(2):
            for back in range(len(WALLS) + len(SKIES)):
                result.append([_place(floor, pattern, back, rng) for _ in range(versions)])
    return result


def _place(floor: int, pattern: int, back: int, rng: random.Random) -> str:
    word = rng.choice(FLOOR_WORDS[floor]) + (" checkered" if pattern else "")
    ground = rng.choice(("floor", "floor", "ground"))
    if back < len(WALLS):
        behind = f"{rng.choice(('against', 'in front of'))} a {rng.choice(WALL_WORDS[back])} wall"
    else:
        behind = f"under a {rng.choice(SKY_WORDS[back - len(WALLS)])} sky"
    plain = ("an empty floor", "empty floor", "nothing", "an empty scene", "just the floor", "the background", "")
    place = f"{word} {ground}"
    named = (
        f"a {place}",
        f"an empty {place}",
        f"a {place} {behind}",
        f"an empty {place} {behind}",
        f"nothing on a {place}",
    )
    return rng.choice((*named, rng.choice(plain)))


@dataclasses.dataclass
class Table:
    """Token ids of texts: `clip` (rows, V, 77) and `t5` (rows, V, L) int16."""

    clip: torch.Tensor
    t5: torch.Tensor

    def draw(self, rows: torch.Tensor, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        column = torch.randint(self.clip.shape[1], rows.shape, generator=g, device=rows.device)
        return self.clip[rows, column], self.t5[rows, column]


def table(base: Path, length: int, versions: int, device: torch.device, vary: bool = True) -> Table:
    """The table of a base's tokenizers; `vary` adds the words around captions that training uses."""
    rng = random.Random(4)
    texts = [*object_texts(versions), *place_texts(versions, rng)]
    flat = [augment(text, rng) if vary and text else text for row in texts for text in row]
    encoded = [torch.from_numpy(encoder(flat)) for encoder in tokens.encoders(base, length)]
    return Table(*(ids.view(len(texts), versions, -1).to(device) for ids in encoded))
