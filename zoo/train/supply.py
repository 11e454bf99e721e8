"""Pictures and conditions for tuning a finished base: rendered once, turned into latents at once, kept on the device.

Unlike pool.py, which feeds the base's own training, nothing but latents and token ids stays: a tuned model needs
several pictures a scene (the target and what conditions it), and the base's autoencoder is already there.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from zoo import scenes
from zoo.train.captions import Workers
from zoo.train.dist import World, cores
from zoo.train.flow import pack, unpack
from zoo.train.graph import autocast
from zoo.train.log import Log
from zoo.train.pool import warm_up
from zoo.train.vae import moments, to_input


@dataclasses.dataclass
class Latents:
    """Posteriors of pictures as packed, scaled tokens: `mean` and `std` (P, N, 64) bfloat16 on the device."""

    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A draw from each row's posterior, as the pipelines draw: (B, N, 64) float32."""
        mean = self.mean[rows].float()
        return mean + self.std[rows].float() * torch.randn(mean.shape, generator=generator, device=mean.device)


def join(parts: list[Latents]) -> Latents:
    return Latents(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, world: World) -> Latents:
    """Latents of pictures: uint8 (B, 3, S, S), or float32 in [-1, 1] of the same shape."""
    x = to_input(pictures) if pictures.dtype == torch.uint8 else pictures
    if world.cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    with autocast(world):
        mean, logvar = moments(vae, x)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return Latents(pack((mean - shift) * scale).bfloat16(), pack((0.5 * logvar).exp() * scale).bfloat16())


@torch.no_grad()
def decode(vae: AutoencoderKL, tokens: torch.Tensor, size: int, world: World) -> torch.Tensor:
    """Pictures of packed latents: (B, N, 64) -> (B, 3, size, size) uint8."""
    z = unpack(tokens.float(), size // 8, size // 8) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.autocast(world.device.type, enabled=False):  # full precision: this paints a few sheets
        x = vae.float().decoder(z)
    return ((x.float().clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)


@dataclasses.dataclass
class Shown:
    """Some rendered scenes and their tokenized captions (b, C, 77) and (b, C, L), ids int16 on the device."""

    scenes: scenes.Scenes
    drawn: scenes.Rendered
    clip: torch.Tensor
    t5: torch.Tensor


def shown(config: dict, tokenizers: Path, world: World, log: Log, deadline: float, *, split: str, pictures: int,
          seed: int) -> Iterator[Shown]:  # fmt: skip
    """Rendered scenes of this process's part of a split, until `pictures` are done or the deadline has come.

    At least one chunk comes, whatever the deadline. The texts are written by worker processes meanwhile.
    """
    chunk = min(config["chunk"], pictures)
    processes = max(1, min(14, cores() // world.size - 1))
    with tempfile.TemporaryDirectory(prefix=f"captions-{world.rank}-") as scratch:
        workers = Workers(
            Path(scratch), chunks=-(-pictures // chunk), chunk=chunk, seed=seed, split=split,
            start=world.rank * pictures, captions=config["captions"], length=config["length"], tokenizers=tokenizers,
            processes=processes,
        )  # fmt: skip
        try:
            warm_up(config, world)
            yield from _until(workers, config, world, log, deadline, split)
        finally:
            workers.close()


def _until(workers: Workers, config: dict, world: World, log: Log, deadline: float, split: str) -> Iterator[Shown]:
    done, said, began = 0, time.time(), time.time()
    for index in range(workers.chunks):
        made = workers.take(index, deadline if done else deadline + 120)
        if made is None:
            return
        part, tokens = made
        clip, t5 = tokens["clip"].to(world.device), tokens["t5"].to(world.device)
        at = 0
        for drawn in render(part, config, world):
            rows = slice(at, at + len(drawn.image))
            yield Shown(part[rows], drawn, clip[rows], t5[rows])
            at, done = rows.stop, done + len(drawn.image)
            if time.time() > deadline and done >= config["least"]:
                break
        if time.time() - said > 5:
            said = time.time()
            log("render", split=split, pictures=done, pic_s=round(done / (said - began), 1))
        if time.time() > deadline and done >= config["least"]:
            return


def render(part: scenes.Scenes, config: dict, world: World) -> Iterator[scenes.Rendered]:
    """Pictures of scenes as the configuration asks."""
    compiling = config["compile"] and world.cuda
    return scenes.stream(part, config["size"], world.device, config["oversample"], compiling)
