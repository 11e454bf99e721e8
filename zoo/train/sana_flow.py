"""Stage: flow matching. The SANA transformer and its Gemma encoder learn together, from scratch.

Texts take the path of SanaPipeline.encode_prompt: begin token, perhaps the instruction, the prompt, padding that the
cross-attention masks. Dropped prompts are the begin token alone, as the pipeline encodes an empty negative prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from torch import nn

from zoo.train import flow, sana_depthwise
from zoo.train.captions import LABELS
from zoo.train.denoiser import Every
from zoo.train.dist import World
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.sana_models import Parts
from zoo.train.sana_pool import Pool
from zoo.train.sana_text import BOS, PAD


class Joint(nn.Module):
    """Everything that trains in this stage: transformer, text encoder, and a head that names the objects of a picture.

    The head is a training aid and is not exported: it gives the encoder a direct reason to bind colour to shape.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.transformer, self.text = parts.transformer, parts.text_encoder
        self.names = nn.Linear(2 * self.text.config.hidden_size, LABELS)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, L) to (B, L, hidden). Attention is causal and padding comes last, so it needs no mask."""
        return self.text(input_ids=ids, use_cache=False)[0]

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


class Batches:
    """Draws training batches of one process from a pool."""

    def __init__(self, instruction: int, config: dict, world: World, seed: int) -> None:
        self.instruction, self.config = instruction, config
        self.generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)

    def __call__(self, pool: Pool, size: int) -> dict[str, torch.Tensor]:
        g, device = self.generator, self.generator.device
        rows = torch.randint(len(pool), (size,), generator=g, device=device)
        column = torch.randint(pool.ids.shape[1], (size,), generator=g, device=device)
        x0 = pool.latents[rows].float()
        return {
            "x0": x0, "noise": torch.randn(x0.shape, generator=g, device=device), "labels": pool.labels[rows],
            "ids": self.prompts(pool.ids[rows, column].long()),
        }  # fmt: skip

    def prompts(self, ids: torch.Tensor) -> torch.Tensor:
        """Put the instruction before some of the prompts (B, L) and drop some of them whole."""
        chance = torch.rand(2, len(ids), 1, generator=self.generator, device=ids.device)
        told = torch.cat([ids[:, :1], torch.full_like(ids[:, :1], self.instruction), ids[:, 1:-1]], 1)
        ids = torch.where(chance[0] < self.config["instruction"], told, ids)
        empty = torch.full_like(ids, PAD)
        empty[:, 0] = BOS
        return torch.where(chance[1] < self.config["drop"], empty, ids)


def train(joint: Joint, pool: Pool, wide: Pool, valid: Pool, instruction: int, config: dict, mu: float,
          world: World, log: Log, deadline: float, seed: int, save: Callable[[], None],
          max_steps: int | None = None) -> None:  # fmt: skip
    """Train in place until `deadline`; the modules end up holding the averaged weights.

    `mu` is the logarithm of the sampler's flow shift. `save` is called in the chief every `config["save_seconds"]` with
    the averaged weights in place.
    """
    joint.train()
    model = FlatModel(joint, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    draw = Batches(instruction, config, world, seed)
    meter = Meter(log, "flow", config["batch"] * world.size, 3 * flops(joint, pool), world.device.type, world.size)

    def work() -> dict[str, torch.Tensor]:
        # A wide picture has four times the tokens. Its steps are too few to be worth compiling for.
        big = len(wide) > 0 and clock.step % config["wide_every"] == config["wide_every"] - 1
        with torch.compiler.set_stance("force_eager" if big else "default"):
            return learn(wide, config["batch"] // 4) if big else learn(pool, config["batch"])

    def learn(part: Pool, size: int) -> dict[str, torch.Tensor]:
        b = draw(part, size)
        sigmas = flow.sample_sigmas(size, mu, draw.generator)
        x, target = flow.interpolate(b["x0"], b["noise"], sigmas)
        with autocast(world):
            states = joint.states(b["ids"])
            loss = flow.velocity_loss(joint.velocity(x, sigmas, states, b["ids"]), target)
            text = joint.label_loss(states, b["ids"], b["labels"])
        (loss + config["text_weight"] * (1.0 - clock.progress) * text).backward()
        return {"loss": loss.detach(), "text": text.detach()}

    modules = [*joint.transformer.transformer_blocks, *joint.text.layers]
    save_every, fast = Every(config["save_seconds"]), config["compile"] and world.cuda
    with prepared(joint.transformer, config["batch"], pool, fast, log), compiled(modules, fast) as attempt:
        running = True
        while running:
            model.zero_grad()
            terms = attempt(work, model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(**terms, norm=norm)
            running = clock.tick()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7), progress=round(clock.progress, 3))
            if world.chief and running and save_every():
                with ema.swapped():
                    log("flow", valid=validate(joint, valid, mu, world))
                    save()
    model.flat.copy_(ema.flat)
    model.broadcast()
    joint.eval()
    if world.chief:
        log("flow", valid=validate(joint, valid, mu, world))


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
