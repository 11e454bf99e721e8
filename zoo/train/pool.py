"""The training pictures of one process, in device memory: rendered once, encoded once, drawn from at random."""

from __future__ import annotations

import dataclasses
import time

import torch

from zoo import scenes
from zoo.train.captions import LABELS, PER_SCENE, STATED, Workers
from zoo.train.dist import World
from zoo.train.log import Log
from zoo.train.vocab import CLIP_LENGTH


@dataclasses.dataclass
class Pool:
    """P pictures. `images` and `depth` go once `mean` and `std` (packed latents) are there."""

    images: torch.Tensor | None  # (P, 3, S, S) uint8
    depth: torch.Tensor | None  # (Q, S, S) uint8 of the first Q <= P pictures: white near, black far
    clip: torch.Tensor  # (P, C, 77) int16, C captions a picture
    t5: torch.Tensor  # (P, C, L) int16
    labels: torch.Tensor  # (P, 128) uint8
    relations: torch.Tensor  # (P, C, 2, 3) uint8, what each caption states, see captions.relations
    tokens: torch.Tensor  # (P, N) uint8, what each latent token shows (see token_labels)
    mean: torch.Tensor | None = None  # (P, N, D) bfloat16 posterior mean, packed, scaled as the pipeline scales
    std: torch.Tensor | None = None  # (P, N, D) bfloat16

    def __len__(self) -> int:
        return len(self.clip)

    def captions(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A caption of each row, drawn anew: CLIP ids (B, 77), T5 ids (B, L), int64."""
        return self.said(rows, generator)[:2]

    def said(self, rows: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `captions`, and what each caption states: (B, 2, 3) int64."""
        column = torch.randint(self.clip.shape[1], rows.shape, generator=generator, device=rows.device)
        return tuple(each[rows, column].long() for each in (self.clip, self.t5, self.relations))

    def latents(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A draw from each row's posterior: (B, N, D) float32."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator, device=mean.device)


def depth_picture(depth: torch.Tensor) -> torch.Tensor:
    """Metres (B, S, S) to grey uint8, white at 3 m and black from 18 m on, linear in inverse depth."""
    near, far = 1 / 3, 1 / 18
    return (((1 / depth.clamp(min=1e-3) - far) / (near - far)).clamp(0, 1) * 255).to(torch.uint8)


def by_count(labels: torch.Tensor) -> torch.Tensor:
    """Rows to draw from, given the pictures' labels (P, 128): those of two objects stand twice, of three three times.

    They are harder. int64 on the labels' device.
    """
    count = labels[:, : labels.shape[1] // 2].sum(1).long()
    return torch.arange(len(labels), device=labels.device).repeat_interleave(count)


PATCH = 16  # pixels of a latent token's side
TOKEN_CLASSES = 1 + len(scenes.SHAPES) * len(scenes.COLORS)
_COVERED = 0.35  # of a token's pixels, for an object to be what it shows


def token_labels(mask: torch.Tensor, look: torch.Tensor, patch: int = PATCH) -> torch.Tensor:
    """What each latent token shows: 0 is no object, 1 + shape * 8 + colour one that covers a third of it.

    mask (B, S, S) int8: slot of the object at a pixel, or -1; look (B, K) int64: shape * 8 + colour of each slot.
    Returns (B, (S / patch)^2) uint8, row by row.
    """
    slots = torch.stack([(mask == slot).float() for slot in range(look.shape[1])], 1)
    area, slot = torch.nn.functional.avg_pool2d(slots, patch).flatten(2).max(1)  # (B, N) each
    shown = look.to(mask.device).gather(1, slot) + 1
    return torch.where(area > _COVERED, shown, 0).to(torch.uint8)


def warm_up(config: dict, world: World) -> None:
    """Compile the renderer while worker processes are still starting; a compiler that fails leaves it uncompiled."""
    if not (config["compile"] and world.cuda):
        return
    try:
        for _ in scenes.stream(scenes.sample(1, 0, "train"), config["size"], world.device, config["oversample"], True):
            torch.cuda.synchronize()
    except Exception as error:
        config["compile"] = False
        print(f"warning: rendering goes on uncompiled: {type(error).__name__}: {error}", flush=True)


def build(config: dict, world: World, log: Log, deadline: float, workers: Workers) -> Pool:
    """Render the scenes that `workers` draw until `deadline`; at least one chunk is made.

    The texts come from the worker processes, which end here; the pictures are drawn here on the world's device.
    """
    length, captions, size = config["length"], config["captions"], config["size"]
    count, chunk = workers.chunks, workers.chunk
    total, kept_depth = count * chunk, min(config["depth"], count * chunk)
    make = lambda *shape, kind: torch.zeros(*shape, dtype=kind, device=world.device)  # noqa: E731
    pool = Pool(
        images=make(total, 3, size, size, kind=torch.uint8), depth=make(kept_depth, size, size, kind=torch.uint8),
        clip=make(total, captions, CLIP_LENGTH, kind=torch.int16), t5=make(total, captions, length, kind=torch.int16),
        labels=make(total, LABELS, kind=torch.uint8), relations=make(total, captions, STATED, 3, kind=torch.uint8),
        tokens=make(total, (size // PATCH) ** 2, kind=torch.uint8),
    )  # fmt: skip
    try:
        filled = _fill(pool, workers, config, world, log, deadline)
    finally:
        workers.close()
    for field in dataclasses.fields(Pool):
        value = getattr(pool, field.name)
        if value is not None:
            setattr(pool, field.name, value[:filled])
    return pool


def _fill(pool: Pool, workers: Workers, config: dict, world: World, log: Log, deadline: float) -> int:
    began, said, filled, count = time.time(), time.time(), 0, workers.chunks
    for index in range(count):
        # The first chunk is worth waiting for: without it there is nothing to train on.
        chunked = workers.take(index, deadline if filled else deadline + 120)
        if chunked is None:
            break
        part, tensors = chunked
        _draw(pool, part, tensors, filled, config, world)
        filled += len(part)
        if world.cuda:
            torch.cuda.synchronize()
        if time.time() - said > 5 or index == count - 1:
            said = time.time()
            log("render", split=workers.split, pictures=filled, pic_s=round(filled / (said - began), 1))
        if time.time() > deadline:
            break
    if not filled:
        raise RuntimeError("no pictures were rendered before the deadline; give the render stage more minutes")
    return filled


def _draw(pool: Pool, part: scenes.Scenes, tensors: dict, filled: int, config: dict, world: World) -> None:
    rows = slice(filled, filled + len(part))
    for name in PER_SCENE:
        getattr(pool, name)[rows] = tensors[name].to(world.device, non_blocking=True)
    at, look = filled, part.shape * len(scenes.COLORS) + part.color
    drawn_parts = scenes.stream(part, size=config["size"], device=world.device, oversample=config["oversample"],
                                       compile=config["compile"] and world.cuda)  # fmt: skip
    for drawn in drawn_parts:
        pool.images[at : at + len(drawn.image)] = drawn.image
        pool.tokens[at : at + len(drawn.image)] = token_labels(
            drawn.mask, look[at - filled : at - filled + len(drawn.mask)]
        )
        room = len(pool.depth) - at
        if room > 0:
            pool.depth[at : at + len(drawn.image)] = depth_picture(drawn.depth[:room])
        at += len(drawn.image)
