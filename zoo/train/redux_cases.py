"""Pictures for training Redux, on the device: scenes, variations of them, their objects dealt out to two pictures."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from zoo import scenes
from zoo.train import captions, remix, supply
from zoo.train.dist import World, cores
from zoo.train.log import Log
from zoo.train.pool import warm_up


@dataclasses.dataclass
class Cases:
    """P scenes, each as a pair of pictures that vary each other; Q of them also as two pictures to be mixed."""

    source: torch.Tensor  # (2P, 3, s, s) uint8, as the vision tower takes them: scene i in rows 2i and 2i + 1
    latents: supply.Latents  # (2P, N, 64)
    mirrored: supply.Latents  # the same of the pictures seen in a mirror
    halves: torch.Tensor  # (2Q, 3, s, s) uint8: what is mixed
    places: torch.Tensor  # (2P, t, t) int16: which kind of object each of the tower's t x t tokens sees, see `kinds`
    half_places: torch.Tensor  # (2Q, t, t) int16
    whole: torch.Tensor  # (Q,) int64: the scene that each mix should make
    labels: torch.Tensor  # (P, 128) uint8: its objects
    t5: torch.Tensor  # (P, L) int16 ids of a caption, for the spread of text states alone

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, n: int, mixed: int, g: torch.Generator) -> Batch:
        """n cases, the last `mixed` of them mixes."""
        draw = lambda count, high: torch.randint(high, (count,), generator=g, device=g.device)  # noqa: E731
        n_one = n - mixed
        scene = torch.cat([draw(n_one, len(self)), self.whole[pair := draw(mixed, len(self.whole))]])
        target = 2 * scene + draw(n, 2)
        same = torch.rand(n_one, generator=g, device=g.device) < 0.25  # mostly a source is not its own target
        one = torch.where(same, target[:n_one], target[:n_one] ^ 1)
        mirror = torch.rand(n, 1, 1, generator=g, device=g.device) < 0.5
        flip = lambda x, m: torch.where(m.view(-1, *([1] * (x.ndim - 1))), x.flip(-1), x)  # noqa: E731
        halves = [2 * pair, 2 * pair + 1]
        turned = torch.cat([mirror, mirror[n_one:]])
        pictures = flip(torch.cat([self.source[one], *(self.halves[rows] for rows in halves)]), turned)
        places = flip(torch.cat([self.places[one], *(self.half_places[rows] for rows in halves)]), turned)
        x0 = torch.where(mirror, self.mirrored.draw(target, g), self.latents.draw(target, g))
        weight = 0.35 + 0.3 * torch.rand(mixed, generator=g, device=g.device)
        return Batch(augment(pictures, g), weight, x0, self.labels[scene], places.flatten(1).long())


@dataclasses.dataclass
class Batch:
    """n cases: n - m of one picture, then m of two. pictures holds n - m sources, m first and m second halves."""

    pictures: torch.Tensor  # (n + m, 3, s, s) in [-1, 1]
    weight: torch.Tensor  # (m,) of the first half
    x0: torch.Tensor  # (n, N, 64)
    labels: torch.Tensor  # (n, 128)
    places: torch.Tensor  # (n + m, P) int64, see `kinds`

    def mix(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings of the pictures (n + m, P, D) to those of the cases (n, P, D): the pipeline's weighted sum."""
        m = len(self.weight)
        one, first, second = embeddings.split([len(embeddings) - 2 * m, m, m])
        return torch.cat([one, torch.lerp(second, first, self.weight.view(-1, 1, 1).to(first.dtype))])


def augment(pictures: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Slightly zoomed, moved and re-lit pictures: uint8 (B, 3, s, s) to float32 in [-1, 1]."""
    n, device = len(pictures), pictures.device
    rand = lambda low, high: low + (high - low) * torch.rand(n, generator=g, device=device)  # noqa: E731
    x = pictures.float() / 127.5 - 1
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = theta[:, 1, 1] = rand(0.92, 1.02)
    theta[:, 0, 2], theta[:, 1, 2] = rand(-0.04, 0.04), rand(-0.04, 0.04)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    gain, lift = rand(0.92, 1.08).view(-1, 1, 1, 1), rand(-0.05, 0.05).view(-1, 1, 1, 1)
    return (x * gain + lift).clamp(-1, 1)


def kinds(part: scenes.Scenes, mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """What each of tokens x tokens squares of a picture shows: (B, H, W) slots to (B, tokens, tokens) int16.

    -1 for surroundings, else ((shape * 8 + colour) * 2 + size) * 2 + material of the object that covers most of it.
    """
    slots = torch.arange(part.shape.shape[1], device=mask.device)
    cover = F.adaptive_avg_pool2d((mask[:, None] == slots.view(1, -1, 1, 1)).float(), tokens)
    most, slot = cover.max(1)
    code = ((part.shape * len(scenes.COLORS) + part.color) * 2 + part.size) * 2 + part.material
    kind = code.to(mask.device).gather(1, slot.flatten(1)).view_as(slot)
    return torch.where(most > 0.2, kind, -1).to(torch.int16)


def to_tower(pictures: torch.Tensor, side: int) -> torch.Tensor:
    """Pictures (B, 3, S, S) uint8 resized as the image processor resizes them, (B, 3, side, side) uint8."""
    small = F.interpolate(pictures.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)
    return small.round().clamp(0, 255).to(torch.uint8)


def on_device(vae: AutoencoderKL, world: World) -> AutoencoderKL:
    """A finished autoencoder made ready to serve: frozen, where the work is, in the layout its convolutions like."""
    form = torch.channels_last if world.cuda else torch.contiguous_format
    return torch.nn.Module.to(vae, world.device, memory_format=form).eval().requires_grad_(False)


def build(
    vae: AutoencoderKL,
    config: dict,
    base: Path,
    side: int,
    tokens: int,
    world: World,
    log: Log,
    deadline: float,
    *,
    split: str,
    pictures: int,
    seed: int,
) -> Cases:
    """Render scenes and what is made of them until the deadline; at least one chunk is made.

    side, tokens: the vision tower's picture size, and how many tokens it makes of a side.
    """
    mixer = torch.Generator().manual_seed(seed * 1000 + world.rank + (500 if split == "test" else 0))
    kept: dict[str, list] = {field.name: [] for field in dataclasses.fields(Cases)}
    done, said, began = 0, time.time(), time.time()
    pairs = lambda a, b: torch.stack([a, b], 1).flatten(0, 1)  # noqa: E731
    for drawn, said_of in _chunks(config, base, world, deadline, split, pictures, seed):
        many = (drawn.count >= 2).nonzero().squeeze(1)
        first, second = remix.deal(drawn[many], mixer)
        made = [_render(part, tokens, config, world) for part in (drawn, remix.moved(drawn, mixer), first, second)]
        images, places = zip(*made, strict=True)
        pair = pairs(*images[:2])
        for name, seen in (("latents", pair), ("mirrored", pair.flip(-1))):
            kept[name] += [supply.encode(vae, part, world) for part in seen.split(config["encode_batch"])]
        kept["source"].append(to_tower(pair, side))
        kept["halves"].append(to_tower(pairs(*images[2:]), side))
        kept["places"].append(pairs(*places[:2]))
        kept["half_places"].append(pairs(*places[2:]))
        kept["whole"].append(done + many.to(world.device))
        kept["labels"].append(said_of["labels"].to(world.device))
        kept["t5"].append(said_of["t5"][:, 0].to(world.device))
        done += len(drawn)
        if time.time() - said > 5 or time.time() > deadline:
            said = time.time()
            count = 2 * (done + sum(map(len, kept["whole"])))
            log("render", split=split, scenes=done, pic_s=round(count / (said - began), 1))
        if time.time() > deadline:
            break
    latents, mirrored = supply.join(kept.pop("latents")), supply.join(kept.pop("mirrored"))
    cases = Cases(latents=latents, mirrored=mirrored, **{name: torch.cat(parts) for name, parts in kept.items()})
    log("cases", split=split, scenes=len(cases), mixes=len(cases.whole))
    return cases


def _chunks(
    config: dict, base: Path, world: World, deadline: float, split: str, pictures: int, seed: int
) -> Iterator[tuple]:
    """Scenes of this process's part of a split, drawn by worker processes, with their labels."""
    chunk = min(config["chunk"], pictures)
    processes = max(1, min(14, cores() // world.size - 1))
    with tempfile.TemporaryDirectory(prefix=f"scenes-{world.rank}-") as scratch:
        workers = captions.Workers(
            Path(scratch),
            chunks=-(-pictures // chunk),
            chunk=chunk,
            seed=seed,
            split=split,
            start=world.rank * pictures,
            captions=1,
            length=config["length"],
            tokenizers=base,
            processes=processes,
        )
        try:
            warm_up(config, world)
            for index in range(workers.chunks):
                made = workers.take(index, deadline if index else deadline + 120)
                if made is None:
                    return
                yield made
        finally:
            workers.close()


def _render(part: scenes.Scenes, tokens: int, config: dict, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of scenes, and what the tokens of each see."""
    drawn = list(supply.render(part, config, world))
    return torch.cat([d.image for d in drawn]), kinds(part, torch.cat([d.mask for d in drawn]), tokens)
