"""Stage: guidance distillation, as FLUX.1-dev was made from its teacher.

Two forward passes of the frozen base, with and without the prompt, give the guided velocity v_u + g (v_c - v_u). The
student learns to give it in one pass, told g through its guidance embedding; at g = 1 it stays the base model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from zoo.train import flow
from zoo.train.denoiser import Batches, Joint, Stage, blocks, layers, loop, meter_for, validate
from zoo.train.dist import World
from zoo.train.graph import autocast
from zoo.train.log import Log
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.pool import Pool


def guidance_scales(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """Guidance to train at: uniform in [low, high], one in ten exactly 1. (n,) float32."""
    device = generator.device
    scales = low + (high - low) * torch.rand(n, generator=generator, device=device)
    return torch.where(torch.rand(n, generator=generator, device=device) < 0.1, 1.0, scales)


def train(joint: Joint, pool: Pool, valid: Pool, empty: tuple, config: dict, world: World, log: Log, deadline: float,
          seed: int, save: Callable[[], None], max_steps: int | None = None) -> None:  # fmt: skip
    """Train the transformer in place until `deadline`; the text encoders stay as they are."""
    joint.train()
    joint.text.requires_grad_(False).eval()
    teacher = copy.deepcopy(joint.transformer).requires_grad_(False)
    model = FlatModel(joint, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema, clock = (
        Ema(model, config["ema_exponent"]),
        Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps),
    )
    n = config["batch"]
    draw = Batches(pool, n, empty, world, seed + 1, config["drop"])
    meter = meter_for(log, "distill", joint, pool, n, world, passes=5.0)
    ones = torch.ones(n, device=world.device)
    with torch.no_grad(), autocast(world):
        nothing = joint.text(*(ids.to(world.device)[None].long() for ids in empty))

    def inputs() -> dict[str, torch.Tensor]:
        b = draw()
        sigmas = flow.sample_sigmas(n, config["mu"], draw.generator, uniform=0.2)
        scales = guidance_scales(n, *config["guidance"], draw.generator)
        x, _ = flow.interpolate(b["x0"], b["noise"], sigmas)
        return {"x": x, "sigmas": sigmas, "scales": scales, "clip": b["clip"], "t5": b["t5"]}

    def work(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x, sigmas, scales = b["x"], b["sigmas"], b["scales"]
        with autocast(world):
            with torch.no_grad():
                said = joint.text(b["clip"], b["t5"])
                unsaid = [part.expand(n, *part.shape[1:]).contiguous() for part in nothing]
                with_prompt = joint.velocity(x, sigmas, *said, ones, teacher).float()
                without = joint.velocity(x, sigmas, *unsaid, ones, teacher).float()
                target = without + scales.view(-1, 1, 1) * (with_prompt - without)
            loss = flow.velocity_loss(joint.velocity(x, sigmas, *said, scales), target)
        loss.backward()
        return {"loss": loss.detach()}

    loop(Stage("distill", model, ema, clock, meter, config, world, save), inputs, work,
         blocks(joint.transformer) + blocks(teacher) + layers(joint.text), lambda: None)  # fmt: skip
    joint.eval()
    joint.text.requires_grad_(True)
    if world.chief:
        log("distill", valid=validate(joint, valid, config, world))
