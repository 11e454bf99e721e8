"""Does a picture show what its caption names? Matching of detections with objects, and the probe's own accuracy."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from zoo import scenes
from zoo.probe.model import ATTRIBUTES, Detection
from zoo.scenes import Caption, Named, Scenes, geometry

# A stated relation counts as shown from these differences on: a share of the picture's width, and metres of depth.
ACROSS, ALONG = 0.02, 0.20


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One picture against its caption.

    objects: every named object is there with its colour and shape, each matched with its own detection.
    strict: the same with size and material where named. relations: per stated relation, whether it is shown.
    counted: the picture holds as many objects as are named. shown: how many named objects were matched.
    """

    objects: bool
    strict: bool
    relations: tuple[bool, ...]
    counted: bool
    shown: int


def judge(caption: Caption, found: Sequence[Detection]) -> Verdict:
    """Judge detections by the best one-to-one matching: most named objects first, then relations, then details."""
    best = max((_score(caption, slots, found) for slots in _matchings(caption.objects, found)), key=_rank)
    return dataclasses.replace(best, counted=len(found) == len(caption.objects))


def _rank(verdict: Verdict) -> tuple[int, int, bool]:
    return verdict.shown, sum(verdict.relations), verdict.strict


def _matchings(named: Sequence[Named], found: Sequence[Detection]):
    """All ways to give each named object one detection of its colour and shape, or None."""
    options = [[None, *(i for i, d in enumerate(found) if agrees(n, d, strict=False))] for n in named]
    for slots in itertools.product(*options):
        used = [s for s in slots if s is not None]
        if len(used) == len(set(used)):
            yield slots


def agrees(named: Named, found: Detection, strict: bool) -> bool:
    """Whether a detection has the named shape and colour, and if `strict` the named size and material too."""
    names = ("shape", "color", "size", "material") if strict else ("shape", "color")
    return all(getattr(named, name) in (None, getattr(found, name)) for name in names)


def _score(caption: Caption, slots: Sequence[int | None], found: Sequence[Detection]) -> Verdict:
    matched = [None if s is None else found[s] for s in slots]
    strict = all(d is not None and agrees(n, d, strict=True) for n, d in zip(caption.objects, matched, strict=True))
    relations = tuple(_holds(matched[i], relation, matched[j]) for i, relation, j in caption.relations)
    shown = sum(d is not None for d in matched)
    return Verdict(shown == len(matched), strict, relations, False, shown)


def _holds(a: Detection | None, relation: str, b: Detection | None) -> bool:
    if a is None or b is None:
        return False
    gap = {"left": b.x - a.x, "right": a.x - b.x, "front": b.depth - a.depth, "behind": a.depth - b.depth}[relation]
    return gap >= (ACROSS if relation in ("left", "right") else ALONG)


def truth(batch: Scenes) -> list[list[Detection]]:
    """What a perfect detector would say of renders of these scenes."""
    places = geometry.project(batch, batch.position).tolist()
    columns = {name: getattr(batch, name).tolist() for name in ATTRIBUTES}
    result = []
    for b, count in enumerate(batch.count.tolist()):
        objects = []
        for k in range(count):
            names = {name: words[columns[name][b][k]] for name, words in ATTRIBUTES.items()}
            x, y, depth = places[b][k]
            objects.append(Detection(**names, x=x, y=y, depth=depth, score=1.0))
        result.append(objects)
    return result


def accuracy(found: Sequence[Sequence[Detection]], batch: Scenes, captions: Sequence[Caption] | None = None) -> dict:
    """The probe's figures on renders of known scenes: recall, precision, each attribute, relations, whole captions.

    A detection and an object belong together when their centres are within 6 % of the picture's side. Attribute rates
    are over such pairs; `relations` is over all unambiguous relations of both-detected pairs.
    """
    tally: dict[str, list[int]] = {name: [0, 0] for name in ("recall", "precision", *ATTRIBUTES, "relations")}

    def count(name: str, right: int, total: int) -> None:
        tally[name][0] += right
        tally[name][1] += total

    holds = geometry.relations(batch)
    for b, (real, seen) in enumerate(zip(truth(batch), found, strict=True)):
        pairs = _nearest(real, seen)
        count("recall", len(pairs), len(real))
        count("precision", len(pairs), len(seen))
        for name in ATTRIBUTES:
            count(name, sum(getattr(real[i], name) == getattr(seen[j], name) for i, j in pairs.items()), len(pairs))
        for i, j in itertools.permutations(pairs, 2):
            stated = [r for r, true in zip(scenes.RELATIONS, holds[b, i, j].tolist(), strict=True) if true]
            count("relations", sum(_holds(seen[pairs[i]], r, seen[pairs[j]]) for r in stated), len(stated))
    figures = {name: right / max(1, total) for name, (right, total) in tally.items()}
    captions = captions or scenes.describe(batch, 0)
    return {**figures, **{f"caption_{k}": v for k, v in rates(captions, found).items()}, "pictures": len(batch)}


def _nearest(real: Sequence[Detection], seen: Sequence[Detection], reach: float = 0.06) -> dict[int, int]:
    """Pairs of the closest first, each used once."""
    apart = lambda a, b: ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5  # noqa: E731
    near = sorted((apart(a, b), i, j) for i, a in enumerate(real) for j, b in enumerate(seen))
    pairs: dict[int, int] = {}
    for distance, i, j in near:
        if distance <= reach and i not in pairs and j not in pairs.values():
            pairs[i] = j
    return pairs


def rates(captions: Sequence[Caption], found: Sequence[Sequence[Detection]]) -> dict[str, float]:
    """Shares over pictures (objects, strict, counted) and over stated relations (relations)."""
    verdicts = [judge(c, f) for c, f in zip(captions, found, strict=True)]
    stated = [right for v in verdicts for right in v.relations]
    share = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    return {
        "objects": share([v.objects for v in verdicts]),
        "strict": share([v.strict for v in verdicts]),
        "relations": share(stated),
        "counted": share([v.counted for v in verdicts]),
    }


def stack(images: Sequence) -> torch.Tensor:
    """PIL pictures of one size as (B, 3, H, W) uint8."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.asarray(i.convert("RGB")).copy()).permute(2, 0, 1) for i in images])
