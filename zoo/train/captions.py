"""Scenes and their tokenized captions, made ahead of time by worker processes so that the GPU never waits for text.

A worker draws scenes, several captions for each, and writes one safetensors file a chunk:
`scene.<field>` tensors, `clip` (S, C, 77) and `t5` (S, C, L) int16, `labels` (S, 128) uint8, `relations` (S, C, 2, 3)
uint8; S scenes, C captions each.
Run as `python -m zoo.train.captions`; `start_workers` does that.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from zoo import scenes
from zoo.train import vocab, words

_NEUTRAL = """
about again almost alone also always another because before begin between child city clock coffee cow dance
deer dinner eagle early earth evening family friend guitar happy horse kitchen knife letter lion machine music
nice ocean owl people piano queen rabbit river sister sleep song spring station story summer tiger today
together train turtle umbrella valley village water weather week winter wolf woman year young zebra
""".split()  # noqa: SIM905
LABELS = 128  # (shape, colour, size) and (shape, colour, material), 64 each
STATED = 2  # relations that a caption can state
PER_SCENE = ("clip", "t5", "labels", "relations")  # what a chunk holds beside its scenes


def augment(text: str, rng: random.Random) -> str:
    """A caption as it is, or, one time in five, with words around or in it that change nothing about the picture."""
    draw = rng.random()
    if draw < 0.07:
        return f"{rng.choice(words.OPENERS)} {text}"
    if draw < 0.13:
        return f"{text.rstrip('.')}, {rng.choice(words.CLOSERS)}"
    if draw < 0.17:
        closers = ", ".join(rng.sample(words.CLOSERS, 2))
        return f"{rng.choice(words.OPENERS)} {text.rstrip('.')}, {closers}"
    if draw < 0.20:
        return f"{text} {_noise(rng)}" if rng.random() < 0.5 else f"{_noise(rng)} {text}"
    return text


def _noise(rng: random.Random) -> str:
    """One or two words that name nothing in a picture: a made-up word, or a common one that captions never use."""
    return " ".join(rng.choice((rng.choice(_NEUTRAL), _made_up(rng))) for _ in range(rng.randint(1, 2)))


def _made_up(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))


def labels(drawn: scenes.Scenes) -> torch.Tensor:
    """Which kinds of object are there: (S, 128) uint8, see LABELS."""
    out = torch.zeros(len(drawn), LABELS, dtype=torch.uint8)
    look = drawn.shape * len(scenes.COLORS) + drawn.color  # (S, K)
    for slot in range(look.shape[1]):
        rows = torch.nonzero(drawn.count > slot).squeeze(1)
        out[rows, look[rows, slot] * 2 + drawn.size[rows, slot]] = 1
        out[rows, 64 + look[rows, slot] * 2 + drawn.material[rows, slot]] = 1
    return out


def relations(drawn: scenes.Scenes, said: list[scenes.Caption]) -> torch.Tensor:
    """What a caption of each scene states: (S, 2, 3) uint8, each row a look, a relation and another look.

    A look is shape * 8 + colour, a relation 1 + its place in scenes.RELATIONS; rows of zeros fill up.
    """
    look = (drawn.shape * len(scenes.COLORS) + drawn.color).tolist()
    out = torch.zeros(len(said), STATED, 3, dtype=torch.uint8)
    for scene, caption in enumerate(said):
        for row, (i, name, j) in enumerate(caption.relations):
            one, other = (look[scene][caption.objects[k].slot] for k in (i, j))
            out[scene, row] = torch.tensor((one, 1 + scenes.RELATIONS.index(name), other))
    return out


def make_chunk(job: argparse.Namespace, index: int) -> dict[str, torch.Tensor]:
    """Tensors of chunk `index` of a job (see the module's text)."""
    drawn = scenes.sample(job.chunk, job.seed, job.split, start=job.start + index * job.chunk)
    clip, t5 = vocab.encoders(job.tokenizers, job.length)
    rng = random.Random(f"{job.seed} {job.split} {job.start + index * job.chunk}")
    clip_ids, t5_ids, stated = [], [], []
    for _ in range(job.captions):
        described = scenes.describe(drawn, rng.getrandbits(32))
        said = [augment(c.text, rng) if job.split == "train" else c.text for c in described]
        stated.append(relations(drawn, described))
        clip_ids.append(torch.from_numpy(clip(said)))
        t5_ids.append(torch.from_numpy(t5(said)))
    fields = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(drawn)}
    out = {f"scene.{name}": value.contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    ids = {"clip": torch.stack(clip_ids, 1), "t5": torch.stack(t5_ids, 1)}
    return out | ids | {"labels": labels(drawn), "relations": torch.stack(stated, 1)}


def read_chunk(path: Path, seed: int, split: str) -> tuple[scenes.Scenes, dict[str, torch.Tensor]]:
    """The scenes of a chunk file, and its `clip`, `t5`, `labels` and `relations`."""
    tensors = load_file(path)
    fields = {name.removeprefix("scene."): v for name, v in tensors.items() if name.startswith("scene.")}
    return scenes.Scenes(seed=seed, split=split, **fields), {n: tensors[n] for n in PER_SCENE}


class Workers:
    """Worker processes that write chunk files in turns; `take` waits for one and reads it."""

    def __init__(self, folder: Path, *, chunks: int, chunk: int, seed: int, split: str, start: int, captions: int,
                 length: int, tokenizers: Path, processes: int) -> None:  # fmt: skip
        self.folder, self.seed, self.split, self.chunks, self.chunk = Path(folder), seed, split, chunks, chunk
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("*.safetensors"):
            old.unlink()
        base = [sys.executable, "-m", "zoo.train.captions", "--chunk", chunk, "--seed", seed, "--split", split,
                "--start", start, "--captions", captions, "--length", length, "--tokenizers", tokenizers,
                "--out", folder, "--chunks", chunks, "--step", processes]  # fmt: skip
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.running = [
            subprocess.Popen([str(part) for part in [*base, "--first", first]], env=env)
            for first in range(min(processes, chunks))
        ]

    def take(self, index: int, deadline: float) -> tuple[scenes.Scenes, dict[str, torch.Tensor]] | None:
        """Chunk `index`, or None if it is not there by `deadline`. Raises RuntimeError if its worker failed."""
        path = self.folder / f"{index:05d}.safetensors"
        while not path.exists():
            worker = self.running[index % len(self.running)]
            if worker.poll() not in (None, 0) or (worker.poll() == 0 and not path.exists()):
                raise RuntimeError(f"the caption worker of chunk {index} ended with status {worker.returncode}")
            if time.time() > deadline:
                return None
            time.sleep(0.02)
        chunk = read_chunk(path, self.seed, self.split)
        path.unlink()
        return chunk

    def close(self) -> None:
        for worker in self.running:
            worker.terminate()
            worker.wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write chunks of scenes with tokenized captions.")
    for name in ("chunk", "seed", "start", "captions", "length", "chunks", "first", "step"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    torch.set_num_threads(1)
    job = _arguments()
    for index in range(job.first, job.chunks, job.step):
        part = job.out / f"{index:05d}.part"
        save_file(make_chunk(job, index), part)
        part.rename(job.out / f"{index:05d}.safetensors")


if __name__ == "__main__":
    main()
