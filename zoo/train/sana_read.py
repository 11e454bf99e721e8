"""Stage: reading. SANA's Gemma encoder learns what captions say, and where they say it is, before it guides a picture.

As `reading.py` does for the small FLUX: a step costs little, so thousands fit into a minute, and what stands left of
what is what flow matching alone is slowest to teach.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from zoo.train.denoiser import Stage, loop
from zoo.train.dist import World
from zoo.train.graph import autocast
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.places import KNOWN, Places, weighed
from zoo.train.sana_batches import Batches
from zoo.train.sana_flow import Joint, answers
from zoo.train.sana_pool import Pool


def train(joint: Joint, pool: Pool, valid: Pool, instruction: int, config: dict, told: float, world: World, log: Log,
          deadline: float, seed: int, save: Callable[[], None], max_steps: int | None = None) -> None:  # fmt: skip
    """Train the text encoder in place until `deadline`, with a head that stays in `joint.places` for the next stage.

    `told` is the share of prompts with the instruction before them.
    """
    joint.train()
    joint.places = Places(joint.text.config.hidden_size).to(world.device)
    learns = nn.ModuleList([joint.text, joint.names, joint.places])
    model = FlatModel(learns, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    draw = Batches(pool, config["batch"], instruction, world, seed + 2, told=told, drop=0.0, pictures=False)
    meter = Meter(log, "read", config["batch"] * world.size, 0.0, "", world.size)

    def work(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with autocast(world):
            states = joint.states(b["ids"])
            text = joint.label_loss(states, b["ids"], b["labels"])
            terms = joint.places.loss(states, b["ids"], *(b[name] for name in KNOWN))
            loss = text + weighed(terms)
        loss.backward()
        return {name: term.detach() for name, term in {"loss": loss, "text": text, **terms}.items()}

    loop(Stage("read", model, ema, clock, meter, config, world, save), draw, work, list(joint.text.layers),
         lambda: None)  # fmt: skip
    if world.chief:
        log("read", **answers(joint, valid, world))
