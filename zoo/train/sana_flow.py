"""Stage: flow matching. The SANA transformer and its Gemma encoder learn together, from scratch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from torch import nn

from zoo.train import flow, sana_depthwise
from zoo.train.captions import LABELS
from zoo.train.denoiser import Shown, Stage, loop, overheard
from zoo.train.dist import World
from zoo.train.graph import autocast
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.places import KNOWN, Places, order_told, stated_told, weighed
from zoo.train.sana_batches import Batches
from zoo.train.sana_models import Parts
from zoo.train.sana_pool import Pool
from zoo.train.sana_text import PAD


class Joint(nn.Module):
    """Everything that trains: transformer, text encoder, and a head that names the objects of a picture.

    The head is a training aid and is not exported: it gives the encoder a direct reason to bind colour to shape.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.transformer, self.text = parts.transformer, parts.text_encoder
        self.names = nn.Linear(2 * self.text.config.hidden_size, LABELS)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) to (B, L, hidden). Attention is causal and padding comes last, so no other mask is needed.

        Given outright: to find out for itself which mask it needs the encoder asks the device, and a recorded step
        must not.
        """
        length = ids.shape[1]
        causal = torch.full((1, 1, length, length), -torch.inf, device=ids.device).triu(1)
        masks = dict.fromkeys(("full_attention", "sliding_attention"), causal)
        return self.text(input_ids=ids, attention_mask=masks, use_cache=False)[0]

    def velocity(self, x: torch.Tensor, sigmas: torch.Tensor, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), sigmas (B,), states (B, L, hidden) of ids (B, L) -> (B, C, H, W)."""
        return self.transformer(
            x, encoder_hidden_states=states, encoder_attention_mask=(ids != PAD).to(x.dtype), timestep=sigmas * 1000,
            return_dict=False,
        )[0]  # fmt: skip

    def label_loss(self, states: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy of the named objects; rows of empty prompts do not count. labels (B, 128)."""
        real = (ids != PAD).unsqueeze(-1)
        mean = (states * real).sum(1) / real.sum(1)
        top = states.masked_fill(~real, -1e4).amax(1)
        logits = self.names(torch.cat([mean, top], 1)).float()
        said = (ids[:, 1] != PAD).float().unsqueeze(1)
        return (F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none") * said).mean()


def train(joint: Joint, pool: Pool, wide: Pool, valid: Pool, instruction: int, config: dict, mu: float,
          world: World, log: Log, deadline: float, seed: int, save: Callable[[], None],
          max_steps: int | None = None) -> None:  # fmt: skip
    """Train in place until `deadline`; the modules end up holding the averaged weights.

    `mu` is the logarithm of the sampler's flow shift. `save` is called in the chief every `config["save_seconds"]` with
    the averaged weights in place.
    """
    joint.train()
    joint.shown = Shown(joint.transformer.norm_out.norm.normalized_shape[0]).to(world.device)
    joint.places = getattr(joint, "places", None) or Places(joint.text.config.hidden_size).to(world.device)
    model = FlatModel(joint, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    meter = Meter(log, "flow", config["batch"] * world.size, 3 * flops(joint, pool), world.device.type, world.size)

    def drawer(part: Pool, size: int, stream: int) -> Batches:
        return Batches(part, size, instruction, world, seed + stream, told=config["instruction"], drop=config["drop"])

    draw = drawer(pool, config["batch"], 0)
    # A wide picture has four times the tokens.
    draw_wide = drawer(wide, config["batch"] // 4, 500) if len(wide) else None

    def inputs() -> dict[str, torch.Tensor]:
        big = draw_wide and clock.step % config["wide_every"] == config["wide_every"] - 1
        b = (draw_wide if big else draw)()
        sigmas = flow.sample_sigmas(len(b["x0"]), mu, draw.generator, noisy=config["noisy"])
        x, target = flow.interpolate(b.pop("x0"), b.pop("noise"), sigmas)
        left = torch.full((), 1.0 - clock.progress, device=world.device)
        return {**b, "x": x, "target": target, "sigmas": sigmas, "left": left}

    def work(b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Wide steps are too few to be worth compiling for.
        eager = b["x"].shape[-1] > pool.latents.shape[-1]
        with torch.compiler.set_stance("force_eager" if eager else "default"), autocast(world):
            states = joint.states(b["ids"])
            loss = flow.velocity_loss(joint.velocity(b["x"], b["sigmas"], states, b["ids"]), b["target"])
            text = joint.label_loss(states, b["ids"], b["labels"])
            shown = joint.shown.loss(heard["states"], b["tokens"])
            told = joint.places.loss(states, b["ids"], *(b[name] for name in KNOWN))
            aids = config["text_weight"] * text + config["tokens_weight"] * shown
            aids = aids + 0.25 * config["places_weight"] * weighed(told)
        (loss + b["left"] * aids).backward()
        return {name: term.detach() for name, term in {"loss": loss, "text": text, "shown": shown, **told}.items()}

    def check() -> None:
        log("flow", valid=validate(joint, valid, mu, world), **answers(joint, valid, world))

    modules, fast = [*joint.transformer.transformer_blocks, *joint.text.layers], config["compile"] and world.cuda
    with prepared(joint.transformer, config["batch"], pool, fast, log), overheard(joint.transformer) as heard:
        loop(Stage("flow", model, ema, clock, meter, {**config, "compile": fast}, world, save), inputs, work, modules,
             check)  # fmt: skip
    joint.eval()
    if world.chief:
        check()


@contextlib.contextmanager
def prepared(transformer: SanaTransformer2DModel, batch: int, pool: Pool, fast: bool, log: Log) -> Iterator[None]:
    """Within this context the transformer is set up for training; its function stays the same.

    The stream of tokens is float32 from the first block on, so that all blocks share one compiled graph, and depthwise
    convolutions take the quicker of two ways.
    """
    hook = transformer.patch_embed.register_forward_hook(lambda module, inputs, output: output.float().contiguous())
    convolutions = [block.ff.conv_depth for block in transformer.transformer_blocks]
    swap = fast and sana_depthwise.shifts_win(convolutions[0], batch, pool.latents.shape[-1], log)
    for convolution in convolutions if swap else ():
        convolution.__class__ = sana_depthwise.ShiftedConv
    try:
        yield
    finally:
        hook.remove()
        for convolution in convolutions:
            convolution.__class__ = nn.Conv2d


def flops(joint: Joint, pool: Pool) -> float:
    """Floating-point operations of one picture's forward pass, by parameters and tokens (attention is linear)."""
    tokens = pool.latents.shape[-1] * pool.latents.shape[-2]
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    blocks = count(joint.transformer.transformer_blocks)
    return 2.0 * (blocks * tokens + count(joint.text.layers) * pool.ids.shape[2])


@torch.no_grad()
def validate(joint: Joint, valid: Pool, mu: float, world: World, limit: int = 512) -> float:
    """Loss on held-out pictures and captions, with the same noise and noise levels each time."""
    g = torch.Generator(world.device).manual_seed(1)
    x0 = valid.latents[:limit].float()
    ids = valid.ids[:limit, 0].long()
    sigmas = flow.shift_sigmas((torch.arange(len(x0), device=world.device) + 0.5) / len(x0), mu)
    x, target = flow.interpolate(x0, torch.randn(x0.shape, generator=g, device=world.device), sigmas)
    with torch.compiler.set_stance("force_eager"), autocast(world):  # not worth compiling for one batch
        v = joint.velocity(x, sigmas, joint.states(ids), ids)
    return round(float(flow.velocity_loss(v, target)), 5)


@torch.no_grad()
def answers(joint: Joint, valid: Pool, world: World) -> dict[str, float]:
    """How well held-out prompts tell where things are."""
    ids, relations = valid.ids[:, 0].long(), valid.relations[:, 0].long()
    with torch.compiler.set_stance("force_eager"), autocast(world):
        states = joint.states(ids)
        shares = {"order": order_told(joint.places, states, ids, valid.tokens)}
        shares |= stated_told(joint.places, states, ids, relations)
    return {name: round(share, 4) for name, share in shares.items()}
