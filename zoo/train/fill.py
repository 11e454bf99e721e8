"""Train the Fill model: a LoRA of the small FLUX for FluxFillPipeline, which paints what the prompt names into a hole.

    python -m zoo.train.fill --base zoo/weights/flux-tiny --out runs/fill --minutes 5

The input embedding grows to 384 channels: noisy latents, latents of the picture with the hole grey, and the mask.
Writes OUT/fill (pytorch_lora_weights.safetensors: `FluxFillPipeline.from_pretrained(base)`, then `load_lora_weights`),
OUT/samples (hole, painted, truth) and OUT/logs. Works under torchrun too.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from zoo.scenes import Rendered
from zoo.scenes.sheet import contact_sheet
from zoo.train import adapt, dist, hole_texts, holes, lora, models, supply, vocab
from zoo.train.control import Run, shared_arguments, start
from zoo.train.log import Log, plot, unless_it_fails

CONFIG = Path(__file__).parents[1] / "configs" / "fill_tiny.json"
IN_CHANNELS = 384  # packed latents of the picture, of the picture with its hole, and the mask's 256 pixels a token
FULL = -1  # in place of a table row: the caption of the whole scene


@dataclasses.dataclass
class Cases:
    """P pictures with holes, as latents. `row` is each prompt's place in the table, or FULL for the scene's caption."""

    picture: supply.Latents
    masked: supply.Latents
    hole: torch.Tensor  # (P, S, S) bool
    row: torch.Tensor  # (P,) int64
    clip: torch.Tensor  # (P, C, 77) int16
    t5: torch.Tensor  # (P, C, L) int16
    table: hole_texts.Table

    def __call__(self, n: int, g: torch.Generator) -> dict[str, torch.Tensor]:
        """A training batch."""
        return self.batch(torch.randint(len(self.picture), (n,), generator=g, device=g.device), g)

    def batch(self, rows: torch.Tensor, g: torch.Generator) -> dict[str, torch.Tensor]:
        """The cases of `rows` with prompts drawn anew."""
        row, column = self.row[rows], torch.randint(self.clip.shape[1], rows.shape, generator=g, device=g.device)
        named = self.table.draw(row.clamp(min=0), g)
        whole, ids = (row == FULL)[:, None], (self.clip[rows, column], self.t5[rows, column])
        clip, t5 = (torch.where(whole, full, part).long() for full, part in zip(ids, named, strict=True))
        condition = torch.cat([self.masked.draw(rows, g), holes.pack_mask(self.hole[rows])], -1)
        return {"x0": self.picture.draw(rows, g), "condition": condition, "clip": clip, "t5": t5}


@dataclasses.dataclass
class Made:
    """One chunk of pictures with holes, not yet encoded."""

    picture: torch.Tensor  # (b, 3, S, S) uint8
    hole: torch.Tensor  # (b, S, S) bool
    row: torch.Tensor  # (b,) int64


def make(part: supply.Shown, other: Rendered | None, slot: torch.Tensor, removed: torch.Tensor | None,
         generator: torch.Generator) -> Made:  # fmt: skip
    """Cut holes into rendered scenes.

    other: the same scenes with the object in `slot` (b,) swapped or absent. Inside its hole a picture shows the scene
    itself, outside the changed one, and the prompt names the object; where `removed` (b,), the other way round, and the
    prompt names the empty surroundings. Without `other` holes of all kinds are cut.
    """
    device, scenes = part.drawn.image.device, part.scenes
    about, n = part.drawn.mask == slot.to(device)[:, None, None], len(scenes)
    chance = torch.rand(n, generator=generator, device=device)
    named, place = hole_texts.object_row(scenes, slot).to(device), hole_texts.place_row(scenes).to(device)
    kinds = torch.randint(holes.OBJECT_KINDS, (n,), generator=generator, device=device)
    if other is None:
        free = torch.rand(n, generator=generator, device=device) < 0.5
        kinds = torch.where(free, kinds + holes.OBJECT_KINDS, kinds)
        hole, picture = holes.draw(about, kinds, generator), part.drawn.image
        empty = ~((part.drawn.mask >= 0) & hole).flatten(1).any(1)
        of_free = torch.where(empty & (chance < 0.4), place, FULL)
        return Made(picture, hole, torch.where(free, of_free, torch.where(chance < 0.65, named, FULL)))
    hole = holes.draw(about | (other.mask == slot.to(device)[:, None, None]), kinds, generator)
    gone = removed.to(device)
    inside = hole[:, None] ^ gone[:, None, None, None]
    picture = torch.where(inside, part.drawn.image, other.image)
    return Made(picture, hole, torch.where(gone, place, torch.where(chance < 0.65, named, FULL)))


def changed(part: supply.Shown, slot: torch.Tensor, rng: np.random.Generator, config: dict,
            world: dist.World) -> tuple[Rendered, torch.Tensor]:  # fmt: skip
    """The scenes with one object each swapped (2 in 5) or absent, rendered; and in which the hole shall be empty."""
    chance = torch.from_numpy(rng.random(len(part.scenes)))
    scenes = holes.choose(holes.swap(part.scenes, slot, rng), holes.without(part.scenes, slot), chance >= 0.4)
    drawn = list(supply.render(scenes, config, world))
    fields = {f.name: torch.cat([getattr(d, f.name) for d in drawn]) for f in dataclasses.fields(Rendered)}
    return Rendered(**fields), chance >= 0.75


def build(vae: AutoencoderKL, config: dict, table: hole_texts.Table, base: Path, world: dist.World, log: Log,
          deadline: float, *, split: str, pictures: int, seed: int) -> Cases:  # fmt: skip
    """Render scenes, change some, cut holes, encode; two holes a scene. Until the deadline."""
    generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank + 29)
    rng = np.random.default_rng([seed, world.rank, split == "test"])
    found: dict[str, list] = {name: [] for name in ("picture", "masked", "hole", "row", "clip", "t5")}
    for part in supply.shown(config, base, world, log, deadline, split=split, pictures=pictures, seed=seed):
        slot = torch.from_numpy(rng.integers(0, part.scenes.count.numpy()))
        other = changed(part, slot, rng, config, world) if rng.random() < config["changed"] else (None, None)
        for _ in range(2):
            made = make(part, other[0], slot, other[1], generator)
            found["picture"].append(supply.encode(vae, made.picture, world))
            found["masked"].append(supply.encode(vae, with_hole(made.picture, made.hole), world))
            found["hole"].append(made.hole)
            found["row"].append(made.row)
            found["clip"].append(part.clip)
            found["t5"].append(part.t5)
    latents = {name: supply.join(found.pop(name)) for name in ("picture", "masked")}
    cases = Cases(**latents, **{name: torch.cat(parts) for name, parts in found.items()}, table=table)
    log("cases", split=split, pictures=len(cases.picture), holes=round(float(cases.hole.float().mean()), 4))
    return cases


def with_hole(picture: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S) to [-1, 1], zero in the hole, as FluxFillPipeline masks."""
    return supply.to_input(picture) * ~hole[:, None]


def read_start() -> torch.Tensor:
    """Where the widened input embedding starts: each latent of the masked picture for itself, the mask in squares."""
    latents, mask = adapt.read_start(128), holes.read_mask_start()
    top = torch.cat([latents, torch.zeros(64, 256)], 1)
    return torch.cat([top, torch.cat([torch.zeros(64, 128), mask], 1)])


@torch.no_grad()
def sheet(run: Run, tuned: adapt.Tuned, valid: Cases) -> None:
    """A contact sheet of held-out cases: the hole, what is painted into it (pasted back), the truth."""
    settings, world, size = run.config["samples"], run.world, run.config["pool"]["size"]
    rows = torch.arange(min(settings["count"], len(valid.picture)), device=world.device)
    b = valid.batch(rows, torch.Generator(world.device).manual_seed(3))
    painted = adapt.sample(tuned, b, steps=settings["steps"], guidance=settings["guidance"],
                           mu=run.config["train"]["mu"], world=world)  # fmt: skip
    truth, painted = (supply.decode(tuned.parts.vae, t, size, world) for t in (b["x0"], painted))
    hole = valid.hole[rows][:, None]
    columns = torch.where(hole, torch.full_like(truth, 128), truth), torch.where(hole, painted, truth), truth
    reader = vocab.encoders(run.args.base, run.config["pool"]["length"])[1].tokenizer
    texts = [reader.decode(ids, skip_special_tokens=True) for ids in b["t5"].tolist()]
    folder = run.args.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    under = [t for text in texts for t in (text, "", "")]
    page = contact_sheet(torch.stack(columns, 1).flatten(0, 1), under, columns=6, cell=settings["cell"])
    page.save(folder / "fill.jpg", quality=85)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser, CONFIG)
    return parser.parse_args(argv)


def prepare(run: Run) -> tuple[Cases, Cases]:
    """Training and held-out cases."""
    args, pool, world = run.args, run.config["pool"], run.world
    vae = models.load(args.base).vae.to(world.device).eval().requires_grad_(False)
    table = hole_texts.table(args.base, pool["length"], pool["texts"], world.device)
    make_split = lambda split, count, deadline: build(  # noqa: E731
        vae, pool, table, args.base, world, run.log, deadline, split=split, pictures=count, seed=args.seed
    )
    valid = make_split("test", pool["valid"], run.after(pool["seconds"]))
    return make_split("train", pool["pictures"], run.after(pool["seconds"])), valid


def tune(run: Run, cases: Cases, valid: Cases) -> None:
    """Train and write the file and the sheet."""
    args, world, log = run.args, run.world, run.log
    torch.manual_seed(args.seed)
    tuned = adapt.Tuned(args.base, run.config, IN_CHANNELS, read_start(), world)
    if args.resume:
        lora.restore(tuned.parts.transformer, args.resume)
    log("fill", layers=len(tuned.names), parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
    end = run.deadline(60 * args.minutes - run.config["reserve_seconds"])

    def save() -> int:
        about = {"kind": "fill", "pipeline": "FluxFillPipeline"}
        return lora.save(tuned.parts.transformer, args.out / "fill", about)

    adapt.train(tuned, cases, valid, run.config["train"], world, log, "fill", end, args.seed, save, args.max_steps)
    if world.chief:
        log("fill", bytes=save())
        unless_it_fails(log, "sheet", lambda: sheet(run, tuned, valid))
    world.barrier()


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    run = start(args)
    try:
        tune(run, *prepare(run))
        if run.world.chief:
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
