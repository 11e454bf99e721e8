"""Tune a finished base to a condition beside the noisy picture: LoRA, flow matching, and guidance kept alive.

The base is distilled: it is told a guidance g and answers with the guided velocity. Tuned on plain data at random g it
would forget that. So training has two parts. First every picture has g = 1, plain data, and now and then no prompt.
Then a copy of the model is kept as the teacher, and half of each batch has g drawn from a range:

    target(g) = (e - x_0) + (g - 1) (v(prompt, condition, 1) - v(no prompt, condition, 1)),    v of the teacher

Both terms of the difference see the condition, so guidance strengthens what the prompt says (colours, materials) and
does not pull the layout away from the condition, which the base's own guidance would do. The teacher stands still: a
model that takes its own difference for the target, times up to g - 1, feeds on its errors (tried: the loss on held-out
pictures rose from 0.11 to 0.27, at learning rates of 2e-3 and 5e-4 alike).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from zoo.train import flow, lora, models, vocab
from zoo.train.denoiser import Joint, blocks
from zoo.train.dist import World
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel

Draw = Callable[[int, torch.Generator], dict[str, torch.Tensor]]
"""(size, generator) -> x0 (B, N, 64), condition (B, N, C), clip (B, 77), t5 (B, L)."""


class Tuned(nn.Module):
    """A base with LoRA in its transformer, ready to train. `empty` holds the ids of the empty prompt."""

    def __init__(self, base: Path, config: dict, in_channels: int, read: torch.Tensor, world: World) -> None:
        super().__init__()
        self.parts = models.load(base)
        self.joint = Joint(self.parts, config["pool"]["size"] // 8)
        self.joint.requires_grad_(False).eval()
        targets = tuple(config["lora"].get("targets", lora.TARGETS))
        self.names = lora.inject(self.parts.transformer, config["lora"]["rank"], in_channels, read, targets)
        self.to(world.device)
        self.parts.to(world.device)  # the autoencoder is no part of `joint`
        clip, t5 = vocab.encoders(base, config["pool"]["length"])
        self.empty = [torch.from_numpy(encoder([""])).long().to(world.device) for encoder in (clip, t5)]

    def velocity(self, x, condition, sigmas, states, pooled, guidance) -> torch.Tensor:
        """x (B, N, 64), condition (B, N, C), sigmas and guidance (B,) -> (B, N, 64)."""
        return self.joint.velocity(torch.cat([x, condition], -1), sigmas, states, pooled, guidance)


def read_start(in_channels: int, known: int = 64) -> torch.Tensor:
    """How the widened input embedding begins to read new latents: each new channel for itself, (new, in_channels)."""
    new = in_channels - known
    return torch.cat([torch.zeros(new, known), torch.eye(new)], 1)


def train(tuned: Tuned, draw: Draw, valid: Draw, config: dict, world: World, log: Log, stage: str, deadline: float,
          seed: int, save: Callable[[], None], max_steps: int | None = None) -> None:  # fmt: skip
    """Train the LoRA until `deadline`; it ends up holding the averaged weights. `save` is called now and then."""
    model = FlatModel(tuned, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    n, generator = config["batch"], torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)
    size = tuned.joint.image_ids.shape[0]
    flops = 4.0 * flow.transformer_flops(dict(tuned.parts.transformer.config), size, tuned.empty[1].shape[1])
    meter = Meter(log, stage, n * world.size, flops, world.device.type, world.size)
    step = Step(tuned, model, draw, config, world, generator)
    saved = time.time()
    with compiled(blocks(tuned.parts.transformer), config["compile"] and world.cuda) as attempt:
        running = True
        while running:
            model.zero_grad()
            loss = attempt(step, model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(loss=loss, norm=norm)
            running = clock.tick()
            if step.teacher is None and clock.progress >= config["guided_from"]:
                step.teacher = ema.flat.clone()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7), progress=round(clock.progress, 3))
            if world.chief and running and time.time() - saved > config["save_seconds"]:
                saved = time.time()
                with ema.swapped():
                    log(stage, valid=validate(tuned, valid, n, world))
                    save()
    model.flat.copy_(ema.flat)
    model.broadcast()
    if world.chief:
        log(stage, valid=validate(tuned, valid, n, world))


class Step:
    """One forward and backward pass; returns the loss. Shapes never change, so everything compiles once."""

    def __init__(self, tuned: Tuned, model: FlatModel, draw: Draw, config: dict, world: World,
                 generator: torch.Generator) -> None:  # fmt: skip
        self.tuned, self.model, self.draw, self.config, self.world = tuned, model, draw, config, world
        self.generator = generator
        self.teacher: torch.Tensor | None = None  # the weights that guided targets are made with, once there are any
        if config["batch"] % 2:
            raise ValueError(f"batch must be even, half of it is guided; got {config['batch']}")

    def __call__(self) -> torch.Tensor:
        n, g, config = self.config["batch"], self.generator, self.config
        guided = 0 if self.teacher is None else n // 2
        b = self._dropped(self.draw(n, g), guided)
        sigmas = flow.sample_sigmas(n, config["mu"], g, uniform=0.2)
        x, target = flow.interpolate(b["x0"], torch.randn(b["x0"].shape, generator=g, device=g.device), sigmas)
        guidance = torch.ones(n, device=g.device)
        # Two contexts: 16-bit copies of weights that autocast makes without gradients must not serve the second pass.
        with torch.no_grad(), autocast(self.world):
            said = self.tuned.joint.text(b["clip"], b["t5"])
        if guided:
            low, high = config["guidance"]
            guidance[:guided] = low + (high - low) * torch.rand(guided, generator=g, device=g.device)
            target[:guided] += (guidance[:guided] - 1).view(-1, 1, 1) * self._direction(x, b, sigmas, said, guided)
        with autocast(self.world):
            loss = flow.velocity_loss(self.tuned.velocity(x, b["condition"], sigmas, *said, guidance), target)
        loss.backward()
        return loss.detach()

    def _dropped(self, b: dict[str, torch.Tensor], plain: int) -> dict[str, torch.Tensor]:
        """Leave the prompt out of some of the plain rows, those from `plain` on; of all rows, the configured share."""
        n, g = len(b["clip"]), self.generator
        drop = torch.rand(n, 1, generator=g, device=g.device) < self.config["drop"] * n / (n - plain)
        drop[:plain] = False
        clip, t5 = self.tuned.empty
        return {**b, "clip": torch.where(drop, clip, b["clip"]), "t5": torch.where(drop, t5, b["t5"])}

    @torch.no_grad()
    def _direction(self, x, b, sigmas, said, count: int) -> torch.Tensor:
        """What the prompt adds to the teacher's velocity in the first `count` rows, beside the condition.

        Returns (count, N, 64) float32. Both halves run as one batch of the training size.
        """
        assert self.teacher is not None
        with self.model.holding(self.teacher), autocast(self.world):
            unsaid = self.tuned.joint.text(*(ids.expand(count, -1) for ids in self.tuned.empty))
            twice = lambda t: torch.cat([t[:count], t[:count]])  # noqa: E731
            texts = [torch.cat([a[:count], u]) for a, u in zip(said, unsaid, strict=True)]
            ones = torch.ones(2 * count, device=x.device)
            v = self.tuned.velocity(twice(x), twice(b["condition"]), twice(sigmas), *texts, ones).float()
        return v[:count] - v[count:]


@torch.no_grad()
def validate(tuned: Tuned, valid: Draw, n: int, world: World) -> float:
    """Loss at g = 1 on held-out cases, with the same noise and noise levels each time."""
    g = torch.Generator(world.device).manual_seed(1)
    b = valid(n, g)
    sigmas = (torch.arange(n, device=world.device) + 0.5) / n
    x, target = flow.interpolate(b["x0"], torch.randn(b["x0"].shape, generator=g, device=world.device), sigmas)
    with autocast(world):
        said = tuned.joint.text(b["clip"], b["t5"])
        v = tuned.velocity(x, b["condition"], sigmas, *said, torch.ones_like(sigmas))
    return round(float(flow.velocity_loss(v, target)), 5)


@torch.no_grad()
def sample(tuned: Tuned, b: dict[str, torch.Tensor], *, steps: int, guidance: float, mu: float, world: World,
           seed: int = 7) -> torch.Tensor:  # fmt: skip
    """Packed latents painted from noise for a batch's conditions and prompts, by the pipeline's own Euler steps."""
    g = torch.Generator(world.device).manual_seed(seed)
    x = torch.randn(b["x0"].shape, generator=g, device=world.device)
    levels = [*flow.shift_sigmas(torch.linspace(1, 1 / steps, steps), mu).tolist(), 0.0]
    scale = torch.full((len(x),), guidance, device=world.device)
    with autocast(world):
        said = tuned.joint.text(b["clip"], b["t5"])
        for now, then in itertools.pairwise(levels):
            v = tuned.velocity(x, b["condition"], torch.full_like(scale, now), *said, scale)
            x = x + (then - now) * v.float()
    return x


def mu_of(scheduler: dict, tokens: int) -> float:
    """The time shift that a FLUX pipeline gives this many image tokens, from its scheduler's configuration."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    base, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    return base + (most - base) * (tokens - low) / (high - low)
