"""The small SANA's training pictures: captions written by worker processes, pictures drawn and encoded on the device.

Most pictures are 256 pixels wide. Some are 512, because SanaPipeline's resolution binning makes every picture at 512
unless it is told not to; latents of both live side by side.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from zoo import scenes
from zoo.train.captions import STATED, augment, labels, relations
from zoo.train.dist import World
from zoo.train.log import Log
from zoo.train.pool import token_labels
from zoo.train.sana_text import Encoder

PATCH = 32  # pixels of a latent's side
_AHEAD = 4  # chunks a process


@dataclasses.dataclass(frozen=True)
class Job:
    """What to draw: `pictures` scenes from number `start` of a seed and split, with `captions` texts each."""

    seed: int
    split: str
    start: int
    pictures: int
    chunk: int
    captions: int
    length: int
    tokenizer: Path


@dataclasses.dataclass
class Pool:
    """P pictures on the device. `images` goes once `latents` is there."""

    images: torch.Tensor | None  # (P, 3, S, S) uint8
    ids: torch.Tensor  # (P, C, L) int16, C captions a picture, without the instruction
    labels: torch.Tensor  # (P, 128) uint8, see zoo.train.captions.labels
    relations: torch.Tensor  # (P, C, 2, 3) uint8, what each caption states, see zoo.train.captions.relations
    tokens: torch.Tensor  # (P, (S/32)^2) uint8, what each latent shows, see zoo.train.pool.token_labels
    latents: torch.Tensor | None = None  # (P, 32, S/32, S/32) bfloat16, scaled as the pipeline scales

    def __len__(self) -> int:
        return len(self.ids)


def write_chunk(job: Job, index: int) -> dict[str, np.ndarray]:
    """Chunk `index` of a job, written in a worker process: `ids` (S, C, L), `labels` (S, 128), `relations` (S, C, 2, 3)
    and `scene.<field>`.

    Arrays, not tensors: tensors would travel through shared memory, of which a container may have little.
    """
    first = index * job.chunk
    drawn = scenes.sample(min(job.chunk, job.pictures - first), job.seed, job.split, start=job.start + first)
    encode, rng = Encoder(job.tokenizer, job.length), random.Random(f"{job.seed} {job.split} {job.start + first}")
    rows, stated = [], []
    for _ in range(job.captions):
        described = scenes.describe(drawn, rng.getrandbits(32))
        said = [augment(c.text, rng) if job.split == "train" else c.text for c in described]
        rows.append(torch.from_numpy(encode(said)))
        stated.append(relations(drawn, described))
    fields = {f"scene.{f.name}": getattr(drawn, f.name) for f in dataclasses.fields(drawn)}
    told = {"ids": torch.stack(rows, 1), "labels": labels(drawn), "relations": torch.stack(stated, 1)}
    tensors = {**told, **fields}
    return {name: value.numpy() for name, value in tensors.items() if isinstance(value, torch.Tensor)}


TOLD = ("ids", "labels", "relations")  # what a chunk holds beside its scenes


def read_chunk(job: Job, chunk: dict[str, np.ndarray]) -> tuple[scenes.Scenes, dict[str, torch.Tensor]]:
    """Scenes of a written chunk, and its `ids`, `labels` and `relations`."""
    tensors = {name: torch.from_numpy(value) for name, value in chunk.items()}
    fields = {name.removeprefix("scene."): value for name, value in tensors.items() if name.startswith("scene.")}
    return scenes.Scenes(seed=job.seed, split=job.split, **fields), {name: tensors[name] for name in TOLD}


def _settle() -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class Writers:
    """Worker processes shared by all pools of a run."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_settle)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def start(self, job: Job) -> Chunks:
        """Begin to write a job; what is asked of it later may be there already."""
        return Chunks(self.pool, job, _AHEAD * self.processes)


class Chunks:
    """The chunks of one job in their order, written a few ahead of the reader."""

    def __init__(self, pool: ProcessPoolExecutor, job: Job, ahead: int) -> None:
        self.pool, self.job, self.count = pool, job, -(-job.pictures // job.chunk)
        self.waiting = [pool.submit(write_chunk, job, index) for index in range(min(self.count, ahead))]
        self.following = len(self.waiting)

    def __iter__(self) -> Iterator[tuple[scenes.Scenes, dict[str, torch.Tensor]]]:
        while self.waiting:
            yield read_chunk(self.job, self.waiting.pop(0).result(timeout=300))
            if self.following < self.count:
                self.waiting.append(self.pool.submit(write_chunk, self.job, self.following))
                self.following += 1

    def close(self) -> None:
        """Give up what is not written yet."""
        for future in self.waiting:
            future.cancel()
        self.waiting = []


def build(chunks: Chunks, size: int, config: dict, world: World, log: Log, seconds: float) -> Pool:
    """Draw a job's pictures, `size` pixels wide; `seconds` after the first chunk was drawn it stops."""
    job = chunks.job
    make = lambda *shape, kind: torch.zeros(job.pictures, *shape, dtype=kind, device=world.device)  # noqa: E731
    pool = Pool(
        images=make(3, size, size, kind=torch.uint8), ids=make(job.captions, job.length, kind=torch.int16),
        labels=make(128, kind=torch.uint8), relations=make(job.captions, STATED, 3, kind=torch.uint8),
        tokens=make((size // PATCH) ** 2, kind=torch.uint8),
    )  # fmt: skip
    began = said = time.time()
    filled = 0
    for drawn, told in chunks:
        at = filled
        for name, value in told.items():
            getattr(pool, name)[at : at + len(drawn)] = value.to(world.device)
        look = drawn.shape * len(scenes.COLORS) + drawn.color
        parts = scenes.stream(drawn, size, world.device, config["oversample"], config["compile"] and world.cuda)
        for part in parts:
            rows = slice(filled, filled + len(part.image))
            pool.images[rows] = part.image
            pool.tokens[rows] = token_labels(part.mask, look[rows.start - at : rows.stop - at], PATCH)
            filled = rows.stop
        if world.cuda:
            torch.cuda.synchronize()
        if at == 0:
            began = time.time()  # the first chunk waits for workers and compilers
        if time.time() - said > 5:
            said = time.time()
            log("render", size=size, split=job.split, pictures=filled, pic_s=round(filled / (said - began), 1))
        if time.time() - began > seconds:
            break
    chunks.close()
    log("render", size=size, split=job.split, pictures=filled, took=round(time.time() - began, 1))
    return Pool(
        **{f.name: value[:filled] for f in dataclasses.fields(Pool) if (value := getattr(pool, f.name)) is not None}
    )
