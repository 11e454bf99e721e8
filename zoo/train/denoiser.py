"""Stage: flow matching. The FLUX transformer, the CLIP and the T5 encoder learn together, from scratch.

The texts take the path FluxPipeline.encode_prompt gives them: padded to fixed lengths, no attention mask, T5's last
states as the sequence, CLIP's state at the end token as the pooled vector.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from zoo.train import flow, replay
from zoo.train.captions import LABELS
from zoo.train.dist import World
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter
from zoo.train.models import Parts
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.places import KNOWN, Places, order_told, stated_told, weighed
from zoo.train.pool import TOKEN_CLASSES, Pool, by_count
from zoo.train.replay import Tensors


class Text(nn.Module):
    """Both text encoders, and heads that name the objects of the picture from what they understood.

    The heads are a training aid and are not exported: they give the encoders a direct reason to bind colour to shape
    before the transformer can use it.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.clip, self.t5 = parts.text_encoder, parts.text_encoder_2
        self.from_clip = nn.Linear(self.clip.config.hidden_size, LABELS)
        self.from_t5 = nn.Linear(2 * self.t5.config.d_model, LABELS)

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 77) and (B, L) ids to states (B, L, d_model) and pooled (B, hidden)."""
        return self.t5(input_ids=t5_ids)[0], self.clip(input_ids=clip_ids).pooler_output

    def label_loss(
        self, states: torch.Tensor, pooled: torch.Tensor, t5_ids: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Binary cross-entropy of both heads; rows of empty prompts do not count. labels (B, 128)."""
        real = (t5_ids != 0).unsqueeze(-1)
        mean = (states * real).sum(1) / real.sum(1).clamp(min=1)
        top = states.masked_fill(~real, -1e4).amax(1)
        heads = self.from_clip(pooled).float(), self.from_t5(torch.cat([mean, top], 1)).float()
        said = (t5_ids[:, 1] != 0).float().unsqueeze(1)  # an empty prompt is its end token and padding
        losses = [F.binary_cross_entropy_with_logits(head, labels.float(), reduction="none") * said for head in heads]
        return sum(loss.mean() for loss in losses)


class Joint(nn.Module):
    """Everything that trains in this stage."""

    def __init__(self, parts: Parts, latent_size: int) -> None:
        super().__init__()
        self.transformer, self.text = parts.transformer, Text(parts)
        self.register_buffer("image_ids", flow.image_ids(latent_size, latent_size), persistent=False)

    def velocity(self, x: torch.Tensor, sigmas: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor,
                 guidance: torch.Tensor, transformer: nn.Module | None = None) -> torch.Tensor:  # fmt: skip
        """The prediction of this or another transformer. x (B, N, 64), sigmas and guidance (B,) -> (B, N, 64)."""
        return (transformer or self.transformer)(
            hidden_states=x, timestep=sigmas, guidance=guidance, pooled_projections=pooled,
            encoder_hidden_states=states, img_ids=self.image_ids,
            txt_ids=torch.zeros(states.shape[1], 3, device=x.device), return_dict=False,
        )[0]  # fmt: skip


class Shown(nn.Module):
    """A training aid that is not exported: names, from the picture's tokens after the last block, what each one shows.

    The renderer knows it. So words get tied to places by a gradient of their own, not only through the velocity, of
    which a small object is a small part. In the spirit of REPA (arXiv 2410.06940), with the truth in place of a
    foreign encoder's features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, TOKEN_CLASSES))

    def loss(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """states (B, N, width), tokens (B, N) classes -> mean cross-entropy."""
        return F.cross_entropy(self.head(states).float().flatten(0, 1), tokens.long().flatten())


@contextlib.contextmanager
def overheard(transformer: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Within this context the last forward pass leaves its picture tokens, before the last norm, in the dictionary."""
    heard: dict[str, torch.Tensor] = {}

    def listen(module: nn.Module, args: tuple) -> None:
        heard["states"] = args[0]

    handle = transformer.norm_out.register_forward_pre_hook(listen)
    try:
        yield heard
    finally:
        handle.remove()


def blocks(transformer: nn.Module) -> list[nn.Module]:
    """What is worth compiling: the repeated blocks, two kinds, each compiled once whatever their number."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def layers(text: nn.Module) -> list[nn.Module]:
    """The repeated layers of both text encoders, to compile."""
    return [module for module in text.modules() if type(module).__name__ in ("CLIPEncoderLayer", "T5Block")]


class Batches:
    """Draws training batches of one process from its pool."""

    def __init__(self, pool: Pool, size: int, empty: tuple[torch.Tensor, torch.Tensor], world: World, seed: int,
                 drop: float, pictures: bool = True) -> None:  # fmt: skip
        self.pool, self.size, self.drop, self.pictures = pool, size, drop, pictures
        self.empty = [ids.to(world.device) for ids in empty]  # ids of the empty prompt: (77,), (L,)
        self.generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)
        self.rows = by_count(pool.labels.to(world.device))

    def __call__(self) -> dict[str, torch.Tensor]:
        g, device = self.generator, self.generator.device
        rows = self.rows[torch.randint(len(self.rows), (self.size,), generator=g, device=device)]
        clip_ids, t5_ids, relations = self.pool.said(rows, g)
        dropped = torch.rand(self.size, 1, generator=g, device=device) < self.drop
        drawn = {"x0": self.pool.latents(rows, g)} if self.pictures else {}
        if drawn:
            drawn["noise"] = torch.randn(drawn["x0"].shape, generator=g, device=device)
        return {
            **drawn, "labels": self.pool.labels[rows], "tokens": self.pool.tokens[rows], "relations": relations,
            "clip": torch.where(dropped, self.empty[0], clip_ids), "t5": torch.where(dropped, self.empty[1], t5_ids),
        }  # fmt: skip


def train(joint: Joint, pool: Pool, valid: Pool, empty: tuple, config: dict, world: World, log: Log, deadline: float,
          seed: int, save: Callable[[], None], max_steps: int | None = None) -> None:  # fmt: skip
    """Train in place until `deadline`; the modules end up holding the averaged weights.

    `save` is called in the chief every `config["save_seconds"]` with the averaged weights in place.
    """
    joint.train()
    if config["tokens_weight"]:
        joint.shown = Shown(joint.transformer.inner_dim).to(world.device)
    if config["places_weight"]:
        joint.places = getattr(joint, "places", None) or Places(joint.text.t5.config.d_model).to(world.device)
    model = FlatModel(joint, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema, clock = (
        Ema(model, config["ema_exponent"]),
        Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps),
    )
    n = config["batch"]
    draw = Batches(pool, n, empty, world, seed, config["drop"])
    meter = meter_for(log, "flow", joint, pool, n, world, passes=3.0)
    ones = torch.ones(n, device=world.device)

    def inputs() -> dict[str, torch.Tensor]:
        b = draw()
        sigmas = flow.sample_sigmas(n, config["mu"], draw.generator, noisy=config["noisy"])
        x, target = flow.interpolate(b["x0"], b["noise"], sigmas)
        left = torch.full((), 1.0 - clock.progress, device=world.device)
        known = {name: b[name] for name in ("clip", "t5", *KNOWN)}
        return {"x": x, "target": target, "sigmas": sigmas, "left": left, **known}

    def work(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        with autocast(world):
            states, pooled = joint.text(b["clip"], b["t5"])
            loss = flow.velocity_loss(joint.velocity(b["x"], b["sigmas"], states, pooled, ones), b["target"])
            text = joint.text.label_loss(states, pooled, b["t5"], b["labels"])
            aids = config["text_weight"] * text
            terms = {"loss": loss.detach(), "text": text.detach()}
            if config["tokens_weight"]:
                shown = joint.shown.loss(heard["states"], b["tokens"])
                aids, terms["shown"] = aids + config["tokens_weight"] * shown, shown.detach()
            if config["places_weight"]:
                told_by = joint.places.loss(states, b["t5"], *(b[name] for name in KNOWN))
                aids = aids + 0.25 * config["places_weight"] * weighed(told_by)
                terms |= {name: term.detach() for name, term in told_by.items()}
        (loss + b["left"] * aids).backward()
        return terms

    def check() -> None:
        log("flow", valid=validate(joint, valid, config, world), **told(joint, valid, world))

    with overheard(joint.transformer) as heard:
        loop(Stage("flow", model, ema, clock, meter, config, world, save), inputs, work,
             blocks(joint.transformer) + layers(joint.text), check)  # fmt: skip
    joint.eval()
    if world.chief:
        check()
    for aid in ("shown", "places"):
        if hasattr(joint, aid):
            delattr(joint, aid)


@dataclasses.dataclass
class Stage:
    """What a training loop works with."""

    name: str
    model: FlatModel
    ema: Ema
    clock: Clock
    meter: Meter
    config: dict
    world: World
    save: Callable[[], None]


def loop(stage: Stage, inputs: Callable[[], Tensors], work: Callable[[Tensors], Tensors], modules: list[nn.Module],
         check: Callable[[], None]) -> None:  # fmt: skip
    """Train until the clock says stop: `inputs` draws a batch, `work` adds its gradient; `modules` get compiled.

    The model ends up with the averaged weights. Now and then the chief calls `check` and saves, with them in place.
    """
    model, ema, clock, config, world = stage.model, stage.ema, stage.clock, stage.config, stage.world
    save_every = Every(config["save_seconds"])
    with replay.own_stream(world), compiled(modules, config["compile"]) as attempt:
        step = replay.ByShape(work, model.grad, config["capture"] and world.cuda)
        running = True
        while running:
            batch = inputs()
            terms = attempt(lambda batch=batch: step(batch), model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            stage.meter.add(**terms, norm=norm)
            running = clock.tick()
            rate, progress = round(config["lr"] * clock.factor, 7), round(clock.progress, 3)
            means = stage.meter.report(force=not running, lr=rate, progress=progress, recorded=int(step.active))
            if step.active and not math.isfinite(means.get("loss", 0.0)):
                step.release("the loss is not finite")
            if world.chief and running and save_every():
                with ema.swapped():
                    check()
                    stage.save()
        model.flat.copy_(ema.flat)
        model.broadcast()


class Every:
    """True once `seconds` have passed since it last was; calls are cheap."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.time()

    def __call__(self) -> bool:
        if time.time() - self.last < self.seconds:
            return False
        self.last = time.time()
        return True


def meter_for(log: Log, stage: str, joint: Joint, pool: Pool, batch: int, world: World, passes: float) -> Meter:
    tokens, length = pool.mean.shape[1], pool.t5.shape[2]
    flops = passes * flow.transformer_flops(dict(joint.transformer.config), tokens, length)
    return Meter(log, stage, batch * world.size, flops, world.device.type, world.size)


@torch.no_grad()
def told(joint: Joint, valid: Pool, world: World) -> dict[str, float]:
    """How well held-out prompts tell where things are, if the aid that says so is there."""
    if not hasattr(joint, "places"):
        return {}
    rows = torch.arange(len(valid), device=world.device)
    clip_ids, t5_ids, relations = valid.said(rows, torch.Generator(world.device).manual_seed(2))
    with torch.compiler.set_stance("force_eager"), autocast(world):
        states, _ = joint.text(clip_ids, t5_ids)
        shares = {"order": order_told(joint.places, states, t5_ids, valid.tokens)}
        shares |= stated_told(joint.places, states, t5_ids, relations)
    return {name: round(share, 4) for name, share in shares.items()}


@torch.no_grad()
def validate(joint: Joint, valid: Pool, config: dict, world: World) -> float:
    """Loss on held-out pictures and captions, with the same noise and noise levels each time."""
    rows = torch.arange(min(len(valid), config["batch"]), device=world.device)
    g = torch.Generator(world.device).manual_seed(1)
    clip_ids, t5_ids = valid.captions(rows, g)
    x0 = valid.latents(rows, g)
    sigmas = (torch.arange(len(rows), device=world.device) + 0.5) / len(rows)
    x, target = flow.interpolate(x0, torch.randn(x0.shape, generator=g, device=world.device), sigmas)
    with torch.compiler.set_stance("force_eager"), autocast(world):  # not worth compiling for one batch
        states, pooled = joint.text(clip_ids, t5_ids)
        v = joint.velocity(x, sigmas, states, pooled, torch.ones_like(sigmas))
    return round(float(flow.velocity_loss(v, target)), 5)
