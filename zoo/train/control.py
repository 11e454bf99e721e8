"""Train the Canny and Depth models: control LoRAs of the small FLUX, in the form of FLUX.1-Depth-dev-lora.

    python -m zoo.train.control --kind canny --base zoo/weights/flux-tiny --out runs/control --minutes 5
    python -m zoo.train.control --kind canny depth --base zoo/weights/flux-tiny --out runs/control --minutes 8

`--minutes` is the whole run by the wall clock. Several kinds share the rendered pictures and the time. Writes
OUT/KIND (pytorch_lora_weights.safetensors: `FluxControlPipeline.from_pretrained(base)`, then `load_lora_weights`),
OUT/samples (contact sheets: map, picture painted, render) and OUT/logs. Works under torchrun too.
`--resume OUT/KIND`, or for several kinds `--resume OUT`, goes on from finished ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from zoo.scenes.sheet import contact_sheet
from zoo.train import adapt, dist, edges, lora, models, supply
from zoo.train.flux_tiny import read_config
from zoo.train.log import Log, plot, unless_it_fails
from zoo.train.maps import MAPS, THRESHOLDS

CONFIG = Path(__file__).parents[1] / "configs" / "control_tiny.json"
IN_CHANNELS = 128  # packed latents of the picture, then of the control map


@dataclasses.dataclass
class Cases:
    """P pictures and their control maps as latents, with captions; `versions` maps a picture, in rows of their own."""

    picture: supply.Latents
    control: dict[str, supply.Latents]  # of each kind: (P * versions, N, 64)
    clip: torch.Tensor  # (P, C, 77) int16
    t5: torch.Tensor  # (P, C, L) int16
    versions: int
    maps: dict[str, torch.Tensor]  # (P, S, S) uint8, the first version as it is; of held-out cases only

    def draws(self, kind: str) -> adapt.Draw:
        """Training batches of one kind."""

        def draw(n: int, g: torch.Generator) -> dict[str, torch.Tensor]:
            rows = torch.randint(len(self.picture), (n,), generator=g, device=g.device)
            return self.batch(kind, rows, g)

        return draw

    def batch(
        self, kind: str, rows: torch.Tensor, g: torch.Generator, version: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The cases of `rows`, with a caption drawn anew and one version of the map (drawn too, if None)."""
        pick = lambda high: torch.randint(high, rows.shape, generator=g, device=rows.device)  # noqa: E731
        column = pick(self.clip.shape[1])
        map_rows = rows * self.versions + (pick(self.versions) if version is None else version)
        return {
            "x0": self.picture.draw(rows, g), "condition": self.control[kind].draw(map_rows, g),
            "clip": self.clip[rows, column].long(), "t5": self.t5[rows, column].long(),
        }  # fmt: skip


def build(vae: AutoencoderKL, kinds: list[str], config: dict, base: Path, world: dist.World, log: Log,
          deadline: float, *, split: str, pictures: int, seed: int) -> Cases:  # fmt: skip
    """Render pictures and their maps and encode both, until the deadline."""
    generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank + 17)
    picture, clip, t5, versions = [], [], [], 1
    control, kept = {kind: [] for kind in kinds}, {kind: [] for kind in kinds}
    shown = supply.shown(config, base, world, log, deadline, split=split, pictures=pictures, seed=seed)
    for part in shown:
        picture.append(supply.encode(vae, part.drawn.image, world))
        for kind in kinds:
            maps = MAPS[kind](part.drawn, generator)  # (b, versions, S, S)
            versions = maps.shape[1]
            grey = maps.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
            control[kind].append(supply.encode(vae, grey, world))
            if split == "test":
                kept[kind].append(maps[:, 0])
        clip.append(part.clip)
        t5.append(part.t5)
    cases = Cases(
        supply.join(picture), {kind: supply.join(parts) for kind, parts in control.items()}, torch.cat(clip),
        torch.cat(t5), versions, {kind: torch.cat(parts) for kind, parts in kept.items() if parts},
    )  # fmt: skip
    log("cases", split=split, pictures=len(cases.picture), maps=versions)
    return cases


@dataclasses.dataclass
class Run:
    args: argparse.Namespace
    config: dict
    world: dist.World
    log: Log
    began: float

    def deadline(self, seconds: float) -> float:
        """The time `seconds` after the run began."""
        return self.began + self.world.agree(seconds)

    def after(self, seconds: float) -> float:
        """The time `seconds` from now, the same in every process."""
        return self.world.agree(time.time()) + seconds


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=sorted(MAPS), required=True)
    shared_arguments(parser, CONFIG)
    return parser.parse_args(argv)


def shared_arguments(parser: argparse.ArgumentParser, config: Path, base: bool = True) -> None:
    """What every tuning driver takes."""
    if base:
        parser.add_argument("--base", type=Path, required=True, help="the FLUX pipeline folder to tune")
        parser.add_argument(
            "--resume", type=Path, help="folder of a LoRA to go on from; it may be that of another base"
        )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="of the whole run")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument(
        "--set", action="append", default=[], metavar="train.batch=128", help="change the configuration"
    )
    parser.add_argument("--max-steps", type=int, help="for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))


def start(args: argparse.Namespace) -> Run:
    """Join the world and open the log."""
    began = time.time()
    world = dist.start(args.device)
    torch.manual_seed(args.seed)
    models.quiet()
    log = Log(args.out / "logs", world.chief, began)
    log("start", device=str(world.device), world=world.size, torch=torch.__version__)
    return Run(args, read_config(args.config, args.set), world, log, began)


def tune(run: Run, kind: str, cases: Cases, valid: Cases, deadline: float) -> None:
    """Train one kind and write its file and its sheet."""
    config, world, log, folder = run.config, run.world, run.log, run.args.out / kind
    torch.manual_seed(run.args.seed)
    tuned = adapt.Tuned(run.args.base, config, IN_CHANNELS, adapt.read_start(IN_CHANNELS), world)
    transformer = tuned.parts.transformer
    if run.args.resume:
        own = [run.args.resume / name for name in (kind, f"{kind}-tiny") if (run.args.resume / name).is_dir()]
        lora.restore(transformer, own[0] if own else run.args.resume)
    about = {"kind": kind, "pipeline": "FluxControlPipeline"}
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    log(kind, layers=len(tuned.names), parameters=trained)
    adapt.train(tuned, cases.draws(kind), valid.draws(kind), config["train"], world, log, kind, deadline, run.args.seed,
                lambda: lora.save(transformer, folder, about), run.args.max_steps)  # fmt: skip
    if world.chief:
        log(kind, bytes=lora.save(transformer, folder, about))
        unless_it_fails(log, f"{kind} sheet", lambda: sheet(run, tuned, kind, valid))
    world.barrier()


@torch.no_grad()
def sheet(run: Run, tuned: adapt.Tuned, kind: str, valid: Cases) -> None:
    """A contact sheet of held-out cases: the map, what the model paints for it, the render it came from."""
    settings, world, size = run.config["samples"], run.world, run.config["pool"]["size"]
    rows = torch.arange(min(settings["count"], len(valid.picture)), device=world.device)
    b = valid.batch(kind, rows, torch.Generator(world.device).manual_seed(3), version=0)
    painted = adapt.sample(tuned, b, steps=settings["steps"], guidance=settings["guidance"],
                           mu=run.config["train"]["mu"], world=world)  # fmt: skip
    shown = valid.maps[kind][: len(rows)][:, None].expand(-1, 3, -1, -1)
    columns = [shown, *(supply.decode(tuned.parts.vae, t, size, world) for t in (painted, b["x0"]))]
    if kind == "canny":
        wanted, found = shown[:, 0] > 127, [edges.canny(c, *THRESHOLDS) for c in columns[1:]]
        f1 = [round(float(edges.edge_f1(f, wanted).mean()), 4) for f in found]
        run.log(kind, edge_f1=f1[0], edge_f1_of_renders=f1[1])  # the second: what the autoencoder alone costs
    path = run.args.out / "samples"
    path.mkdir(parents=True, exist_ok=True)
    page = contact_sheet(torch.stack(columns, 1).flatten(0, 1), columns=6, cell=settings["cell"])
    page.save(path / f"{kind}.jpg", quality=85)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    run = start(args)
    try:
        pool, world = run.config["pool"], run.world
        vae = models.load(args.base).vae.to(world.device).eval().requires_grad_(False)
        make = lambda split, count, deadline: build(  # noqa: E731
            vae, args.kind, pool, args.base, world, run.log, deadline, split=split, pictures=count, seed=args.seed
        )
        # Held-out cases come first and take the compiler's time, so the seconds count for training pictures alone.
        valid = make("test", pool["valid"], run.after(pool["seconds"]))
        cases = make("train", pool["pictures"], run.after(pool["seconds"]))
        end = run.deadline(60 * args.minutes - run.config["reserve_seconds"])
        for left, kind in zip(range(len(args.kind), 0, -1), args.kind, strict=True):
            tune(run, kind, cases, valid, run.after((end - time.time()) / left))
        if world.chief:
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
