"""Held-out cases for the control and fill models, and how well a painted picture answers its case.

Everything comes from fixed seeds, so that every precision and every later version of a model meets the same cases.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from zoo import scenes
from zoo.probe import Detection, Probe
from zoo.probe.judge import agrees, rates
from zoo.train import edges, hole_texts, holes
from zoo.train.maps import THRESHOLDS, inverse_depth, rank_correlation, to_bytes

SEED = 2026
REMOVED = 5  # of the fill cases, one in so many asks for an empty floor instead of an object


@dataclasses.dataclass
class Cases:
    """B cases on the CPU. `given` is the control map, or for fill the picture to be filled."""

    prompts: list[str]
    truth: torch.Tensor  # (B, 3, S, S) uint8, a render that answers the case
    given: torch.Tensor  # (B, 3, S, S) uint8
    captions: list[scenes.Caption]  # what a right picture (or hole) shows
    hole: torch.Tensor | None = None  # (B, S, S) bool
    group: list[str] = dataclasses.field(default_factory=list)  # of each fill case: same, changed or removed

    def __len__(self) -> int:
        return len(self.prompts)


def drawn(batch: scenes.Scenes, size: int, device: str) -> scenes.Rendered:
    """Renders of scenes, on the CPU."""
    return scenes.render(batch, size=size, device=device).cpu()


def control(kind: str, count: int, size: int, device: str) -> Cases:
    """Edge or depth maps of held-out renders, with the captions of their scenes."""
    batch = scenes.sample(count, SEED, "test")
    pictures, captions = drawn(batch, size, device), scenes.describe(batch, SEED)
    if kind == "canny":
        maps = edges.canny(pictures.image, *THRESHOLDS).to(torch.uint8) * 255
    else:
        maps = to_bytes(inverse_depth(pictures.depth))
    given = maps[:, None].expand(-1, 3, -1, -1).contiguous()
    return Cases([c.text for c in captions], pictures.image, given, captions)


def fill(count: int, size: int, device: str) -> Cases:
    """Holes in held-out renders. The prompt names the object that was there, another one, or an empty floor."""
    batch, rng = scenes.sample(count, SEED, "test"), np.random.default_rng(SEED)
    slot, rows = torch.from_numpy(rng.integers(0, batch.count.numpy())), torch.arange(count)
    swapped, absent = holes.swap(batch, slot, rng), holes.without(batch, slot)
    group = ["removed" if i % REMOVED == REMOVED - 1 else ("same", "changed")[i % REMOVED % 2] for i in range(count)]
    changed, removed = (torch.tensor([g == name for g in group]) for name in ("changed", "removed"))
    wanted = holes.choose(swapped, absent, removed)
    wanted = holes.choose(wanted, batch, ~changed & ~removed)
    original, after = drawn(batch, size, device), drawn(wanted, size, device)
    about = (original.mask == slot[:, None, None]) | (after.mask == slot[:, None, None])
    hole = holes.draw(about, rows % holes.OBJECT_KINDS, torch.Generator().manual_seed(SEED))
    truth = torch.where(hole[:, None], after.image, original.image)
    alone = hole_texts.one_object(hole_texts.object_row(wanted, slot).tolist())
    captions = _alone(alone)
    places = hole_texts.place_texts(1, random.Random(SEED))
    empty = [places[row - hole_texts.OBJECTS][0] or "an empty floor" for row in hole_texts.place_row(batch).tolist()]
    prompts = [e if g == "removed" else c.text for g, e, c in zip(group, empty, captions, strict=True)]
    return Cases(prompts, truth, original.image, captions, hole, group)


def _alone(batch: scenes.Scenes) -> list[scenes.Caption]:
    """Captions of single objects that say nothing of the surroundings, which are not those of the case."""
    found: list[scenes.Caption | None] = [None] * len(batch)
    for seed in range(200):
        for i, caption in enumerate(scenes.describe(batch, seed)):
            if found[i] is None and not {"floor", "ground", "wall", "sky"} & set(scenes.lexicon.words(caption.text)):
                found[i] = caption
        if None not in found:
            break
    return [caption for caption in found if caption is not None]


def score_canny(cases: Cases, painted: torch.Tensor) -> dict[str, float]:
    """Edge F1 (2 px) of the painted pictures' edges against the map."""
    f1 = torch.cat([
        edges.edge_f1(edges.canny(p, *THRESHOLDS), g[:, 0] > 127)
        for p, g in zip(painted.split(64), cases.given.split(64), strict=True)
    ])  # fmt: skip
    return {"edge_f1": float(f1.mean()), "edge_f1_tenth": float(f1.quantile(0.1))}


class DepthEstimator:
    """A folder that AutoModelForDepthEstimation and AutoImageProcessor open, used as the depth app uses it."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForDepthEstimation

        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = AutoModelForDepthEstimation.from_pretrained(folder).float().to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """Inverse depth up to scale and shift of uint8 pictures (B, 3, S, S): (B, S, S) float32 on the CPU."""
        out = []
        for part in pictures.split(32):
            arrays = [p.permute(1, 2, 0).numpy() for p in part]
            inputs = self.processor(images=arrays, return_tensors="pt").to(self.device)
            depth = self.model(**inputs).predicted_depth.float()[:, None]
            side = pictures.shape[-1]
            out.append(torch.nn.functional.interpolate(depth, (side, side), mode="bilinear").squeeze(1).cpu())
        return torch.cat(out)


def score_depth(cases: Cases, painted: torch.Tensor, estimator: DepthEstimator) -> dict[str, float]:
    """Rank correlation of the painted pictures' estimated depth with the given map."""
    found = estimator(painted)
    rank = torch.cat([
        rank_correlation(f, g[:, 0]) for f, g in zip(found.split(16), cases.given.split(16), strict=True)
    ])  # fmt: skip
    return {"rank_correlation": float(rank.mean()), "rank_correlation_tenth": float(rank.quantile(0.1))}


def score_objects(cases: Cases, painted: torch.Tensor, probe: Probe) -> dict[str, float]:
    """Whether the whole picture shows what its caption names (shapes and colours; relations)."""
    found = rates(cases.captions, probe.detect(painted))
    return {name: found[name] for name in ("objects", "relations")}


def paste(cases: Cases, painted: torch.Tensor) -> torch.Tensor:
    """The painted holes in the given pictures."""
    assert cases.hole is not None
    return torch.where(cases.hole[:, None], painted, cases.given)


def score_fill(cases: Cases, painted: torch.Tensor, probe: Probe) -> dict[str, float]:
    """Shares of holes that show what was asked, and what happened outside them.

    appears: the named colour and shape is found with its centre in the hole, of the same object as before, of another
    one, and of both. emptied: nothing has its centre in a hole that was to be empty. outside_identical: pictures whose
    pixels outside the hole are the given ones after pasting back. outside_psnr: how near they were before, in dB.
    """
    pasted = paste(cases, painted)
    found = probe.detect(pasted)
    inside = [[d for d in some if _in_hole(d, hole)] for some, hole in zip(found, cases.hole, strict=True)]
    right = [
        any(agrees(c.objects[0], d, strict=False) for d in some) for c, some in zip(cases.captions, inside, strict=True)
    ]
    share = lambda values: sum(values) / max(1, len(values))  # noqa: E731
    of = lambda names, values: [v for v, g in zip(values, cases.group, strict=True) if g in names]  # noqa: E731
    outside = ~cases.hole[:, None].expand_as(painted)
    error = ((painted.float() - cases.given.float()).square() * outside).sum() / outside.sum().clamp(min=1)
    same = ((pasted == cases.given) | ~outside).flatten(1).all(1)
    return {
        "appears": share(of(("same", "changed"), right)), "appears_same": share(of(("same",), right)),
        "appears_changed": share(of(("changed",), right)),
        "emptied": share(of(("removed",), [not some for some in inside])),
        "outside_identical": float(same.float().mean()),
        "outside_psnr": float(10 * torch.log10(255**2 / error.clamp(min=1e-6))),
    }  # fmt: skip


def _in_hole(found: Detection, hole: torch.Tensor) -> bool:
    size = hole.shape[-1]
    row, column = int(found.y * size), int(found.x * size)
    return 0 <= row < size and 0 <= column < size and bool(hole[row, column])


def tiles(cases: Cases, painted: torch.Tensor, count: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures and texts of a contact sheet: what was given, what was painted, a right answer."""
    painted, given = painted[:count], cases.given[:count]
    if cases.hole is not None:
        painted = paste(cases, _whole(cases, painted))[:count]
        given = torch.where(cases.hole[:count, None], torch.full_like(given, 128), given)
    rows = torch.stack([given, painted, cases.truth[:count]], 1).flatten(0, 1)
    texts: Sequence[str] = [t for prompt in cases.prompts[:count] for t in (prompt, "", "")]
    return rows, list(texts)


def _whole(cases: Cases, painted: torch.Tensor) -> torch.Tensor:
    """`painted` continued with the given pictures, to the length of all cases."""
    return torch.cat([painted, cases.given[len(painted) :]])
