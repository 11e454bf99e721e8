"""Captions: varied sentences that say only what is true, together with what each of them names.

A relation is stated only where `geometry.relations` finds it beyond doubt, and a caption of a scene names all of its
objects. Attributes that a caption leaves out are open: nothing may be concluded from their absence.
"""

from __future__ import annotations

import dataclasses
import random

from zoo.scenes import geometry, lexicon
from zoo.scenes.scene import Scenes


@dataclasses.dataclass(frozen=True)
class Named:
    """An object as a caption names it; None for what it leaves open. `slot` is its place in the scene."""

    slot: int
    shape: str | None
    color: str | None
    size: str | None = None
    material: str | None = None


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption and its meaning. A relation (i, "left", j) says that objects[i] is left of objects[j]."""

    text: str
    objects: tuple[Named, ...]
    relations: tuple[tuple[int, str, int], ...] = ()

    def __str__(self) -> str:
        return self.text


OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
_BETWEEN = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
_ASIDE = {
    "left": ("to its left", "on its left", "left of it"),
    "right": ("to its right", "on its right", "right of it"),
    "front": ("in front of it",),
    "behind": ("behind it",),
}
_BESIDE = ("next to", "beside")
_VERBS = ("is", "stands", "sits", "lies")
_OPENERS = ("a picture of", "a render of", "a photo of", "a scene with", "an image of", "there is", "we see")
_COUNTS = {1: ("one object :", "a single object :"), 2: ("two objects :",), 3: ("three objects :",)}


class _Facts:
    """Plain Python values of a batch, read from its tensors once."""

    def __init__(self, scenes: Scenes) -> None:
        names = ("index", "count", "shape", "color", "size", "material", "floor", "pattern", "walled", "wall", "sky")
        self.columns = {name: getattr(scenes, name).tolist() for name in names}
        self.relations = geometry.relations(scenes).tolist()
        self.order = scenes.position[..., 0].tolist()

    def __getitem__(self, i: int) -> dict:
        row = {name: column[i] for name, column in self.columns.items()}
        return {**row, "relations": self.relations[i], "x": self.order[i]}


def caption(scenes: Scenes, i: int, rng: random.Random) -> Caption:
    """One caption of scene `i`. For many scenes use `describe`, which reads the tensors once."""
    return _write(_Facts(scenes[i : i + 1])[0], rng)


def describe(scenes: Scenes, seed: int) -> list[Caption]:
    """A caption of each scene. A scene's caption depends on `seed` and on the scene alone, not on the batch."""
    facts = _Facts(scenes)
    return [
        _write(facts[i], random.Random(f"{seed}/{scenes.seed}/{scenes.split}/{facts.columns['index'][i]}"))
        for i in range(len(scenes))
    ]


def captions(scenes: Scenes, seed: int) -> list[str]:
    """The texts of `describe`."""
    return [c.text for c in describe(scenes, seed)]


def _plain(rng: random.Random, options: tuple[str, ...], first: float = 0.72) -> str:
    """The first word of a row most of the time, else one of the others."""
    return options[0] if len(options) == 1 or rng.random() < first else rng.choice(options[1:])


def _name(fact: dict, slot: int, style: str, rng: random.Random) -> tuple[Named, str]:
    """An object's name without its article: what it states, and its words."""
    keep = {"full": (1.0, 1.0), "short": (0.0, 0.0), "mixed": (0.65, 0.55)}[style]
    size = fact["size"][slot] if rng.random() < keep[0] else None
    material = fact["material"][slot] if rng.random() < keep[1] else None
    shape, color = fact["shape"][slot], fact["color"][slot]
    parts = [_plain(rng, lexicon.COLOR_WORDS[color], 0.88)]
    if material is not None:
        word = _plain(rng, lexicon.MATERIAL_WORDS[material])
        parts.insert(1 if rng.random() < 0.7 else 0, word)
    if size is not None:
        parts.insert(0, _plain(rng, lexicon.SIZE_WORDS[size]))
    parts.append(_plain(rng, lexicon.SHAPE_WORDS[shape], 0.78))
    named = Named(
        slot,
        lexicon.SHAPES[shape],
        lexicon.COLORS[color],
        None if size is None else lexicon.SIZES[size],
        None if material is None else lexicon.MATERIALS[material],
    )
    return named, " ".join(parts)


def _a(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _write(fact: dict, rng: random.Random) -> Caption:
    style = rng.choices(("full", "mixed", "short"), (0.34, 0.38, 0.28))[0]
    order = list(range(fact["count"]))
    rng.shuffle(order)
    named, words = zip(*(_name(fact, slot, style, rng) for slot in order), strict=True)
    text, relations = (_one, _two, _three)[len(order) - 1](fact, named, words, rng)
    text = _finish(text, fact, rng, style)
    return Caption(text, named, tuple(relations))


def _finish(text: str, fact: dict, rng: random.Random, style: str) -> str:
    """Perhaps an opener, the surroundings and a full stop."""
    bare = text.split()[0] in ("a", "an") and not any(f" {verb} " in text for verb in _VERBS)
    if bare and rng.random() < (0.10 if style == "short" else 0.16):
        text = f"{rng.choice(_OPENERS)} {text}"
    elif bare and fact["count"] == 1 and rng.random() < 0.12:
        text = text.split(" ", 1)[1]
    if rng.random() < (0.22 if style == "short" else 0.34):
        place = _place(fact, rng)
        text = f"{text} {place}" if rng.random() < 0.8 or not bare else f"{place} , {text}"
    if rng.random() < 0.12:
        text += " ."
    return text.replace(" ,", ",").replace(" .", ".").replace(" :", ":").replace(" ;", ";")


def _place(fact: dict, rng: random.Random) -> str:
    floor = rng.choice(lexicon.FLOOR_WORDS[fact["floor"]])
    if fact["pattern"] == 1 and rng.random() < 0.7:
        floor = f"{floor} checkered" if rng.random() < 0.6 else "checkered"
    floor = f"on {_a(floor)} {rng.choice(('floor', 'floor', 'ground'))}"
    if fact["walled"]:
        back = f"{rng.choice(('against', 'in front of'))} {_a(rng.choice(lexicon.WALL_WORDS[fact['wall']]))} wall"
    else:
        back = f"under {_a(rng.choice(lexicon.SKY_WORDS[fact['sky']]))} sky"
    return rng.choice((floor, floor, back, back, f"{floor} {back}"))


def _holding(fact: dict, a: Named, b: Named, rng: random.Random) -> str | None:
    holds = [r for r, true in zip(lexicon.RELATIONS, fact["relations"][a.slot][b.slot], strict=True) if true]
    return rng.choice(holds) if holds else None


def _one(fact: dict, named: tuple[Named, ...], words: tuple[str, ...], rng: random.Random):
    a = _a(words[0])
    if rng.random() < 0.06:
        return f"{rng.choice(_COUNTS[1])} {a}", ()
    return a, ()


def _two(fact: dict, named: tuple[Named, ...], words: tuple[str, ...], rng: random.Random):
    first, second = named
    a, b = map(_a, words)
    relation = _holding(fact, first, second, rng)
    if relation is None or rng.random() < 0.14:
        listed = rng.choice((f"{a} and {b}", f"{a} and {b}", f"{rng.choice(_COUNTS[2])} {a} and {b}", f"{a} , {b}"))
        return listed, ()
    between, aside = _plain(rng, _BETWEEN[relation], 0.6), rng.choice(_ASIDE[OPPOSITE[relation]])
    stated = ((0, relation, 1),)
    if relation in ("left", "right") and rng.random() < 0.06:
        return f"{a} {rng.choice(_BESIDE)} {b}", ()
    form = rng.choices(range(6), (0.52, 0.14, 0.12, 0.08, 0.07, 0.07))[0]
    texts = (
        f"{a} {between} {b}",
        f"{a} {rng.choice(_VERBS)} {between} {b}",
        f"there is {a} ; {aside} is {b}",
        f"{a} with {b} {aside}",
        f"{between} {b} is {a}",
        f"{rng.choice(_COUNTS[2])} {a} {between} {b}",
    )
    return texts[form], stated


def _three(fact: dict, named: tuple[Named, ...], words: tuple[str, ...], rng: random.Random):
    a, b, c = map(_a, words)
    if rng.random() < 0.22:
        return rng.choice((f"{a} , {b} and {c}", f"{rng.choice(_COUNTS[3])} {a} , {b} and {c}")), ()
    first, last = _holding(fact, named[0], named[1], rng), _holding(fact, named[2], named[1], rng)
    relations = []
    text = f"{a} {'and' if first is None else rng.choice(_BETWEEN[first])} {b}"
    if first:
        relations.append((0, first, 1))
    if last is None:
        return f"{text} , and {c}" if rng.random() < 0.5 else f"{text} with {c}", relations
    relations.append((2, last, 1))
    # Colour and shape together are unique in a scene, so "the red cube" can mean one object only.
    the = f"the {named[1].color} {named[1].shape}"
    return f"{text} , {'and ' if rng.random() < 0.7 else ''}{c} {rng.choice(_BETWEEN[last])} {the}", relations


def vocabulary() -> list[str]:
    """Every word and mark that captions use, sorted: the units a tokenizer needs."""
    rows = (*lexicon.SHAPE_WORDS, *lexicon.COLOR_WORDS, *lexicon.SIZE_WORDS, *lexicon.MATERIAL_WORDS)
    rows += (*lexicon.FLOOR_WORDS, *lexicon.SKY_WORDS, *lexicon.WALL_WORDS, _BESIDE, _VERBS, _OPENERS)
    rows += (*_BETWEEN.values(), *_ASIDE.values(), *_COUNTS.values())
    rows += (("a an the and with on under against in front of is there it its wall sky floor ground checkered",),)
    rows += ((", . : ;",),)
    return sorted({w for row in rows for text in row for w in lexicon.words(text)})
