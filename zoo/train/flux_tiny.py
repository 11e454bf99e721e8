"""Train the small FLUX from nothing: render, autoencoder, text encoders, flow matching, guidance distillation.

    python -m zoo.train.flux_tiny --out runs/a --minutes 15                                    one GPU (or the CPU)
    torchrun --standalone --nproc-per-node 4 -m zoo.train.flux_tiny --out runs/a --minutes 9   four

`--minutes` is the whole run by the wall clock, from start to sample sheets. Writes OUT/model (a diffusers folder),
OUT/samples (contact sheets), OUT/logs (JSON lines, curves). `--resume OLD/model` starts from a finished folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from zoo import scenes
from zoo.train import captions, denoiser, dist, distill, models, pool, reading, samples, vae, vocab
from zoo.train.log import Log, plot, unless_it_fails

CONFIG = Path(__file__).parents[1] / "configs" / "flux_tiny.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument(
        "--set", action="append", default=[], metavar="flow.batch=128", help="change a configured value"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--resume", type=Path, help="a model folder to start from; its autoencoder is kept unless trained"
    )
    parser.add_argument("--vae", type=Path, help="a folder with an autoencoder to take over; the rest starts anew")
    parser.add_argument("--minutes", type=float, default=15.0, help="of the whole run")
    for stage in ("render", "vae", "read", "flow", "distill"):
        parser.add_argument(f"--minutes-{stage}", type=float, help=f"of the {stage} stage; 0 leaves it out")
    parser.add_argument("--max-steps", type=int, help="of each training stage, for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--workers", type=int, help="processes a rank that write captions")
    return parser.parse_args(argv)


def read_config(path: Path, changes: list[str]) -> dict:
    """The configuration with `section.name=value` changes, values in JSON. Raises ValueError for an unknown name."""
    config = json.loads(Path(path).read_text())
    for change in changes:
        name, _, value = change.partition("=")
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place.get(section, {})
        if last not in place:
            raise ValueError(f"--set {change}: the configuration has no {name}")
        place[last] = json.loads(value)
    return config


@dataclasses.dataclass
class Run:
    """What every stage needs, and when each must end (seconds since the epoch)."""

    args: argparse.Namespace
    config: dict
    world: dist.World
    log: Log
    began: float
    tokenizers: Path
    parts: models.Parts

    def minutes(self, stage: str) -> float:
        """Length of the render, vae or read stage."""
        given = getattr(self.args, f"minutes_{stage}")
        if given is not None:
            return given
        kept = self.args.resume or self.args.vae
        return 0.0 if stage == "vae" and kept else self.config["minutes"][stage]

    def split(self) -> dict[str, float]:
        """Minutes of the training stages: what is given, else shares of what is left of the whole run."""
        end = self.began + 60 * (self.args.minutes - self.config["minutes"]["reserve"])
        left, share = self.world.agree(max(0.0, (end - time.time()) / 60)), self.config["minutes"]["distill_part"]
        read = min(self.minutes("read"), 0.2 * left)
        left -= read
        distilled = self.args.minutes_distill
        distilled = left * share if distilled is None else distilled
        flowing = max(0.0, left - distilled) if self.args.minutes_flow is None else self.args.minutes_flow
        return {"read": read, "flow": flowing, "distill": distilled}

    def save(self) -> None:
        models.export(self.parts, self.config["scheduler"], self.tokenizers, self.args.out / "model")


def workers(run: Run, split: str, pictures: int, scratch: Path) -> captions.Workers:
    """Start the processes that draw scenes and write captions for this process's part of a split."""
    world, config = run.world, run.config["pool"]
    share = max(1, dist.cores() // world.size - 2)
    chunk = min(config["chunk"], pictures)
    return captions.Workers(
        scratch / split, chunks=-(-pictures // chunk), chunk=chunk, seed=run.args.seed, split=split,
        start=world.rank * pictures, captions=config["captions"], length=config["length"], tokenizers=run.tokenizers,
        processes=run.args.workers or min(12, share),
    )  # fmt: skip


def render(run: Run) -> tuple[pool.Pool, pool.Pool]:
    """Held-out and training pictures, with the texts of both under way at once."""
    sizes = {"test": run.config["pool"]["valid"], "train": run.config["pool"]["pictures"]}
    deadline = time.time() + 60 * run.minutes("render")
    with tempfile.TemporaryDirectory(prefix=f"captions-{run.world.rank}-") as scratch:
        texts = {split: workers(run, split, count, Path(scratch)) for split, count in sizes.items()}
        pool.warm_up(run.config["pool"], run.world)
        valid, data = (pool.build(run.config["pool"], run.world, run.log, deadline, made) for made in texts.values())
    run.log("render", pictures=len(data), valid=len(valid))
    return data, valid


def prepare(run: Run) -> tuple[pool.Pool, pool.Pool]:
    """Training and held-out pictures, and the autoencoder trained or taken over; both pools encoded."""
    world, config = run.world, run.config
    data, valid = render(run)
    stage = config["vae_stage"]
    if run.minutes("vae") > 0:
        vae.train(run.parts.vae, data, stage, world, run.log, time.time() + 60 * run.minutes("vae"), run.args.seed,
                  run.args.max_steps)  # fmt: skip
        scale, shift = vae.measure_scale(run.parts.vae, data, world, stage["encode_batch"])
        run.parts.vae.register_to_config(scaling_factor=scale, shift_factor=shift)
        run.log("vae", scaling_factor=scale, shift_factor=shift)
    if world.chief:
        run.log("vae", **vae.validate(run.parts.vae, valid.images, world))
        unless_it_fails(run.log, "reconstructions", lambda: _reconstructions(run, valid))
        run.save()
    for each in (data, valid):
        vae.encode_pool(run.parts.vae, each, world, stage["encode_batch"])
    run.log("encode", pictures=len(data))
    return data, valid


@torch.no_grad()
def _reconstructions(run: Run, valid: pool.Pool) -> None:
    """A sheet of held-out pictures, each beside what the autoencoder makes of it."""
    x = vae.to_input(valid.images[:16])
    mean, _ = vae.moments(run.parts.vae, x)
    y = ((run.parts.vae.decoder(mean).clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)
    pairs = torch.stack([valid.images[:16], y], 1).flatten(0, 1)
    folder = run.args.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    samples.contact_sheet(pairs, columns=8, cell=run.config["samples"]["cell"]).save(folder / "vae.jpg", quality=90)


def _sheets(run: Run, config: dict, base: bool = False) -> None:
    samples.sheets(run.args.out / "model", run.args.out / "samples", config, run.log, run.world.device, base=base)


def train_flow(run: Run, data: pool.Pool, valid: pool.Pool) -> None:
    """The text encoders alone, flow matching, then distillation; the last two with a sheet."""
    world, config, args = run.world, run.config, run.args
    joint = denoiser.Joint(run.parts, config["pool"]["size"] // 8).to(world.device)
    clip, t5 = vocab.encoders(run.tokenizers, config["max_sequence_length"])
    empty = tuple(torch.from_numpy(encoder([""])[0]).long() for encoder in (clip, t5))
    trainers = {"read": reading.train, "flow": denoiser.train, "distill": distill.train}
    for stage, minutes in run.split().items():
        if minutes <= 0:
            continue
        run.log(stage, minutes=round(minutes, 2))
        trainers[stage](joint, data, valid, empty, config[stage], world, run.log, time.time() + 60 * minutes, args.seed,
                        run.save, args.max_steps)  # fmt: skip
        if world.chief and stage != "read":
            run.save()
            if stage == "flow":
                sheet = dict(config["samples"], count=min(32, config["samples"]["count"]))
                unless_it_fails(run.log, "base sheet", lambda: _sheets(run, sheet, base=True))  # noqa: B023
        world.barrier()


def start(args: argparse.Namespace) -> Run:
    """Join the world, write or take over the tokenizers, make the networks."""
    began = time.time()
    config, world = read_config(args.config, args.set), dist.start(args.device)
    log = Log(args.out / "logs", world.chief, began)
    torch.manual_seed(args.seed)
    models.quiet()
    tokenizers = args.out / "tokenizers"
    if world.chief:
        for name, write in (("tokenizer", vocab.build_clip), ("tokenizer_2", vocab.build_t5)):
            if args.resume:
                shutil.copytree(args.resume / name, tokenizers / name, dirs_exist_ok=True)
            else:
                write(vocab.vocabulary_words(scenes.vocabulary()), tokenizers / name)
    world.barrier()
    parts = models.load(args.resume) if args.resume else models.build(config, tokenizers)
    if args.vae:
        parts.vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.float32)
    parts.to(world.device)
    sizes = {name: models.count(module) for name, module in parts.named().items()}
    log("start", device=str(world.device), world=world.size, torch=torch.__version__, **sizes)
    return Run(args, config, world, log, began, tokenizers, parts)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    run = start(args)
    try:
        data, valid = prepare(run)
        train_flow(run, data, valid)
        if run.world.chief:
            unless_it_fails(run.log, "sheets", lambda: _sheets(run, run.config["samples"]))
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
        run.world.barrier()
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
