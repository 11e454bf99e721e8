"""The stages of `python -m zoo.train.sana`, in their order."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC

from zoo import scenes
from zoo.train import dist, sana_flow, sana_models, sana_read, sana_samples, sana_vae
from zoo.train.flux_tiny import read_config
from zoo.train.log import Log, plot, unless_it_fails
from zoo.train.models import count, quiet
from zoo.train.pool import warm_up
from zoo.train.sana_pool import Job, Pool, Writers, build
from zoo.train.sana_text import Encoder, build_tokenizer

_RESERVE = 0.5  # minutes for the folder and the sheets


@dataclasses.dataclass
class Run:
    """What every stage needs."""

    args: argparse.Namespace
    config: dict
    world: dist.World
    log: Log
    tokenizer: Path
    parts: sana_models.Parts

    def save(self) -> None:
        sana_models.export(self.parts, self.config["flow_shift"], self.tokenizer, self.args.out / "model")


def start(args: argparse.Namespace) -> Run:
    """Choose the device, write or take over the tokenizer, make the networks."""
    config, world = read_config(args.config, args.set), dist.start(args.device)
    log = Log(args.out / "logs", world.chief)
    torch.manual_seed(args.seed)
    quiet()
    tokenizer = args.out / "tokenizer"
    if world.chief:
        if args.resume:
            shutil.copytree(args.resume / "tokenizer", tokenizer, dirs_exist_ok=True)
        else:
            build_tokenizer(scenes.vocabulary(), tokenizer)
    world.barrier()
    size = Encoder(tokenizer, config["length"]).vocab_size
    parts = sana_models.load(args.resume, config) if args.resume else sana_models.build(config, size)
    if args.vae:
        parts.vae = AutoencoderDC.from_pretrained(args.vae, dtype=torch.float32)
    parts.to(world.device)
    sizes = {name: count(module) for name, module in parts.named().items()}
    log("start", device=str(world.device), world=world.size, torch=torch.__version__, vocabulary=size, **sizes)
    return Run(args, config, world, log, tokenizer, parts)


def draw(run: Run) -> tuple[Pool, Pool, Pool]:
    """Pools of training pictures, of training pictures at twice the size, and of held-out pictures."""
    args, world, config = run.args, run.world, run.config["pool"]
    size, share = config["size"], max(1, dist.cores() // world.size - 2)
    kinds = (
        ("test", config["valid"], size, 0.1),
        ("train", config["wide"], 2 * size, 0.2),
        ("train", config["pictures"], size, 0.7),
    )
    with Writers(args.workers or min(14, share)) as writers:
        jobs = []
        for kind, (split, pictures, side, part) in enumerate(kinds):
            chunk = min(config["chunk"] * size * size // (side * side), pictures)  # the clock is looked at after each
            job = Job(args.seed * 3 + 40 + kind, split, world.rank * pictures, pictures, max(1, chunk),
                      config["captions"], run.config["length"], run.tokenizer)  # fmt: skip
            jobs.append((writers.start(job), side, config, world, run.log, 60 * part * args.minutes_render))
        warm_up(config, world)
        pools = [build(*job) for job in jobs]
    valid, wide, data = pools
    return data, wide, valid


def autoencoder(run: Run, data: Pool, wide: Pool, valid: Pool) -> None:
    """Train the autoencoder or keep it, say how good it is, and turn every pool into latents."""
    world, stage, vae = run.world, run.config["vae_stage"], run.parts.vae
    if run.args.minutes_ae > 0:
        deadline = time.time() + 60 * run.args.minutes_ae
        sana_vae.train(vae, data, wide, stage, world, run.log, deadline, run.args.seed, run.args.max_steps)
        vae.register_to_config(scaling_factor=sana_vae.measure_scale(vae, data, world, stage["encode_batch"]))
    if world.chief:
        small = max(1, stage["encode_batch"] // 8)
        run.log("vae", scaling_factor=vae.config.scaling_factor, psnr=sana_vae.psnr(vae, valid.images, world),
                psnr_noisy=sana_vae.psnr(vae, valid.images, world, 0.1),
                psnr_wide=sana_vae.psnr(vae, wide.images[:64], world, size=small))  # fmt: skip
        unless_it_fails(run.log, "reconstructions", lambda: _reconstructions(run, valid))
        run.save()
    for pool, size in (
        (data, stage["encode_batch"]),
        (valid, stage["encode_batch"]),
        (wide, stage["encode_batch"] // 4),
    ):
        sana_vae.encode_pool(vae, pool, world, max(1, size))
    if world.cuda:
        torch.cuda.empty_cache()
    run.log("encode", pictures=len(data), wide=len(wide))


def _reconstructions(run: Run, valid: Pool) -> None:
    """A sheet of held-out pictures, each beside what the autoencoder makes of it."""
    x = valid.images[:16]
    y = ((sana_vae.reconstruct(run.parts.vae, x, run.world) + 1) * 127.5 + 0.5).to(torch.uint8)
    folder = run.args.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    pairs = torch.stack([x, y], 1).flatten(0, 1)
    sana_samples.contact_sheet(pairs, columns=8, cell=run.config["samples"]["cell"]).save(
        folder / "vae.jpg", quality=90
    )


def denoiser(run: Run, data: Pool, wide: Pool, valid: Pool) -> None:
    """Reading, then flow matching; the folder is written now and then, and at the end."""
    args, world, config = run.args, run.world, run.config["flow"]
    joint = sana_flow.Joint(run.parts).to(world.device)
    instruction = Encoder(run.tokenizer, run.config["length"]).instruction
    if args.minutes_read > 0:
        deadline = time.time() + 60 * args.minutes_read
        sana_read.train(joint, data, valid, instruction, run.config["read"], config["instruction"], world, run.log,
                        deadline, args.seed, run.save, args.max_steps)  # fmt: skip
    deadline = time.time() + 60 * args.minutes_flow
    if args.minutes is not None:
        deadline = min(deadline, run.log.started + 60 * (args.minutes - _RESERVE))
    if args.minutes_flow > 0:
        mu = math.log(run.config["flow_shift"])
        sana_flow.train(joint, data, wide, valid, instruction, config, mu, world, run.log, deadline, args.seed,
                        run.save, args.max_steps)  # fmt: skip
    if world.chief:
        run.save()


def _sheets(now: Run) -> None:
    """Contact sheets of the exported folder."""
    folder = now.args.out
    sana_samples.sheets(folder / "model", folder / "samples", now.config["samples"], now.log, now.world.device)


def run(args: argparse.Namespace) -> None:
    """Do everything that `args` asks for."""
    began = time.time()
    now = start(args)
    try:
        data, wide, valid = draw(now)
        autoencoder(now, data, wide, valid)
        denoiser(now, data, wide, valid)
        if now.world.chief:
            unless_it_fails(now.log, "curves", lambda: plot(now.log.path, args.out / "logs" / "curves.png"))
            unless_it_fails(now.log, "sheets", lambda: _sheets(now))
            now.log("done", minutes=round((time.time() - began) / 60, 2))
        now.world.barrier()
    finally:
        now.world.close()
