"""Train the probe on rendered scenes and report its accuracy on held-out ones.

    python -m zoo.probe.train --minutes 3 --device cuda --out zoo/weights/probe
    python -m zoo.probe.train --minutes 10 --pool 600 --held-out 100 --out probe        # a rough one, on a CPU

The time budget covers everything. At most a third of it goes into rendering (the pool may stay smaller than asked),
then training runs until shortly before its end; the accuracy on held-out scenes is written beside the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from zoo import scenes
from zoo.probe.augment import damage
from zoo.probe.data import Pool, Targets, build_pool, flipped, targets
from zoo.probe.judge import accuracy
from zoo.probe.model import ATTRIBUTES, Network, Probe


def loss(maps: dict[str, torch.Tensor], t: Targets) -> dict[str, torch.Tensor]:
    """CenterNet's losses: focal on the heat map, the rest at the objects' cells alone. Scalars by name."""
    heat, want = maps["heat"][:, 0], t.heat
    p = heat.sigmoid().clamp(1e-4, 1 - 1e-4)
    center = want > 0.999
    missed = -((1 - p) ** 2) * functional.logsigmoid(heat) * center
    false = -((1 - want) ** 4) * p**2 * functional.logsigmoid(-heat) * ~center
    objects = t.present.sum().clamp(min=1)
    parts = {"heat": (missed + false).sum() / objects}

    def read(name: str) -> torch.Tensor:  # (present objects, channels)
        channels = maps[name].flatten(2).movedim(1, 2)
        at = t.cell[..., None].expand(-1, -1, channels.shape[-1])
        return channels.gather(1, at)[t.present]

    for name in ATTRIBUTES:
        parts[name] = functional.cross_entropy(read(name), t.attributes[name][t.present])
    parts["offset"] = functional.smooth_l1_loss(read("offset"), t.offset[t.present], beta=0.2)
    parts["depth"] = functional.smooth_l1_loss(read("depth")[:, 0], t.depth[t.present], beta=0.2)
    return parts


def fit(network: Network, pool: Pool, *, until: float | None = None, steps: int | None = None, batch: int = 128,
        rate: float = 2e-3, seed: int = 0, augment: bool = True, quiet: bool = False) -> list[float]:  # fmt: skip
    """Train in place until a `time.monotonic()` moment or for a number of steps; returns the loss of each step.

    The rate rises over the first 3 % and falls to zero along a cosine, by steps or by the time that has passed.
    """
    if (until is None) == (steps is None):
        raise ValueError("give either until or steps")
    device = pool.images.device
    generator = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    network.train().to(memory_format=torch.channels_last)
    start, losses = time.monotonic(), []
    with tqdm(unit="step", disable=quiet, total=steps) as bar:
        while True:
            done = len(losses) / steps if steps else (time.monotonic() - start) / max(1e-3, (until or 0) - start)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            value = _step(network, optimizer, _draw(pool, batch, generator, augment), augment, generator)
            losses.append(value)
            bar.update()
            if len(losses) % 20 == 0:
                bar.set_postfix(loss=f"{float(value):.3f}", refresh=False)
    network.eval()
    return [float(v) for v in losses]


def _draw(pool: Pool, batch: int, generator: torch.Generator, augment: bool) -> Pool:
    rows = torch.randint(len(pool), (min(batch, len(pool)),), generator=generator, device=pool.images.device)
    part = pool.take(rows)
    turn = torch.rand((), generator=generator, device=pool.images.device) < 0.5
    return flipped(part) if augment and bool(turn) else part


def _step(network: Network, optimizer: torch.optim.Optimizer, part: Pool, augment: bool,
          generator: torch.Generator) -> torch.Tensor:  # fmt: skip
    images = part.images.float() / 255
    if augment:
        images = damage(images, generator)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        maps = network(images.contiguous(memory_format=torch.channels_last))
    value = torch.stack(list(loss(maps, targets(part)).values())).sum()
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 2.0)
    optimizer.step()
    return value.detach()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.probe.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="time budget for everything (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--out", type=Path, required=True, help="folder for probe.safetensors and probe.json")
    parser.add_argument("--pool", type=int, default=30000, help="training pictures, 0.2 MB each (default 30000)")
    parser.add_argument("--held-out", type=int, default=1000, help="pictures that measure it (default 1000)")
    parser.add_argument("--batch", type=int, default=128, help="pictures a step (default 128)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (default 0.002)")
    parser.add_argument(
        "--compile", action="store_true", help="compile the renderer: pays off in runs of 10 minutes or more"
    )
    parser.add_argument("--seed", type=int, default=7, help="seed of scenes and training (default 7)")
    options = parser.parse_args(arguments)

    start = time.monotonic()
    end = start + 60 * options.minutes
    torch.manual_seed(options.seed)
    held = scenes.sample(options.held_out, options.seed, "test")
    with tqdm(desc="render", unit="picture") as bar:
        pool = _fill(options, start + 20 * options.minutes, bar.update)
        shown = build_pool(held, options.device, options.compile, progress=bar.update)
    network = Network().to(options.device)
    reserve = max(2.0, 0.04 * 60 * options.minutes)
    losses = fit(network, pool, until=max(end - reserve, time.monotonic() + 1), batch=options.batch, rate=options.rate,
                 seed=options.seed)  # fmt: skip
    probe = Probe(network)
    figures = accuracy(probe.detect(shown.images), held, scenes.describe(held, 0))
    probe.report = {
        "held_out": {name: round(value, 4) for name, value in figures.items()},
        "training": {"pictures": len(pool), "steps": len(losses), "batch": options.batch, "seed": options.seed,
                     "seconds": round(time.monotonic() - start, 1), "device": _device_name(options.device),
                     "last_loss": round(sum(losses[-50:]) / max(1, len(losses[-50:])), 4)},
    }  # fmt: skip
    probe.save(options.out)
    print(f"{len(losses)} steps on {len(pool)} pictures in {time.monotonic() - start:.0f} s; held out:")
    print("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    print(f"wrote {options.out}")


def _fill(options: argparse.Namespace, until: float, progress) -> Pool:
    """Render the training pool in parts, and stop early when its share of the time is used."""
    parts, part = [], max(16, min(4096, options.pool // 8))
    for first in range(0, options.pool, part):
        batch = scenes.sample(min(part, options.pool - first), options.seed, "train", start=first)
        parts.append(build_pool(batch, options.device, options.compile, progress=progress))
        if time.monotonic() > until:
            break
    attributes = {name: torch.cat([p.attributes[name] for p in parts]) for name in ATTRIBUTES}
    names = [f.name for f in dataclasses.fields(Pool) if f.name != "attributes"]
    return Pool(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names}, attributes=attributes)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
