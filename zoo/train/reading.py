"""Stage: reading. The text encoders learn what captions say, and where they say it is, before any picture is painted.

Captions and the renderer's knowledge suffice, so a step costs little: thousands fit into a minute. What is learned here
(which colour belongs to which shape, what stands left of what) is what flow matching alone is slowest to teach.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from zoo.train.denoiser import Batches, Joint, Stage, layers, loop, meter_for, told
from zoo.train.dist import World
from zoo.train.graph import autocast
from zoo.train.log import Log
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.places import KNOWN, Places, weighed
from zoo.train.pool import Pool
from zoo.train.positions import give_order


def train(joint: Joint, pool: Pool, valid: Pool, empty: tuple, config: dict, world: World, log: Log, deadline: float,
          seed: int, save: Callable[[], None], max_steps: int | None = None) -> None:  # fmt: skip
    """Train the text encoders in place until `deadline`, with heads that stay in `joint.places` for the next stage."""
    joint.train()
    if give_order(joint.text.t5):
        log("read", t5="started anew: it told nothing of the order of words")
    joint.places = Places(joint.text.t5.config.d_model).to(world.device)
    learns = nn.ModuleList([joint.text, joint.places])
    model = FlatModel(learns, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    draw = Batches(pool, config["batch"], empty, world, seed + 2, 0.0, pictures=False)
    meter = meter_for(log, "read", joint, pool, config["batch"], world, passes=0.0)

    def inputs() -> dict[str, torch.Tensor]:
        return {name: value for name, value in draw().items() if name in ("clip", "t5", *KNOWN)}

    def work(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with autocast(world):
            states, pooled = joint.text(b["clip"], b["t5"])
            text = joint.text.label_loss(states, pooled, b["t5"], b["labels"])
            terms = joint.places.loss(states, b["t5"], *(b[name] for name in KNOWN))
            loss = text + weighed(terms)
        loss.backward()
        return {name: term.detach() for name, term in {"loss": loss, "text": text, **terms}.items()}

    loop(Stage("read", model, ema, clock, meter, config, world, save), inputs, work, layers(joint.text), lambda: None)
    if world.chief:
        log("read", **told(joint, valid, world))
