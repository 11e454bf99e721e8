"""Stage: the 32x autoencoder (AutoencoderDC, 256 pixels to 8x8 latents of 32 channels), then pools as latents.

It has no posterior. Noise of up to an eighth of the latents' spread is added in training instead, so that the decoder
takes the small errors of a denoiser (or of its 4-bit weights) lightly.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock, ResBlock
from torch.utils.flop_counter import FlopCounterMode

from zoo.train.dist import World
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.sana_pool import Pool
from zoo.train.vae import loss_terms, to_input


def batch(pool: Pool, wide: Pool, size: int, wide_part: float, generator: torch.Generator) -> torch.Tensor:
    """Pictures (size, 3, S, S) in [-1, 1]; a part of them are S-pixel windows of the larger pictures."""
    draw = lambda n, high: torch.randint(high, (n,), generator=generator, device=generator.device)  # noqa: E731
    x = to_input(pool.images[draw(size, len(pool))])
    side, count = x.shape[-1], int(size * wide_part) if len(wide) else 0
    corners = torch.randint(0, wide.images.shape[-1] - side + 1, (count, 2)).tolist() if count else []
    for place, (row, (top, left)) in enumerate(zip(draw(count, max(1, len(wide))), corners, strict=True)):
        x[place] = to_input(wide.images[row, :, top : top + side, left : left + side])
    return x


def terms(vae: AutoencoderDC, x: torch.Tensor, noise: float) -> dict[str, torch.Tensor]:
    """Loss terms of pictures x: those of zoo.train.vae, and `prior`: latents of mean 0 and mean square 1."""
    z = vae.encoder(x)
    wide = z.float()
    spread = wide.detach().square().mean().sqrt()
    level = noise * spread * torch.rand(len(x), 1, 1, 1, device=x.device)
    found = loss_terms(
        x, vae.decoder((wide + level * torch.randn_like(wide)).to(z.dtype)), wide, torch.zeros_like(wide)
    )
    del found["kl"]
    return found | {"prior": wide.mean(dim=(0, 2, 3)).square().mean() + (wide.square().mean() - 1).square()}


@torch.no_grad()
def forward_flops(vae: AutoencoderDC, size: int) -> float:
    """Floating-point operations of one picture's encoding and decoding, counted on the meta device."""
    shadow = AutoencoderDC.from_config(vae.config).to("meta")
    with FlopCounterMode(display=False) as counter:
        shadow.decoder(shadow.encoder(torch.empty(1, 3, size, size, device="meta")))
    return float(counter.get_total_flops())


def train(vae: AutoencoderDC, pool: Pool, wide: Pool, config: dict, world: World, log: Log, deadline: float, seed: int,
          max_steps: int | None = None) -> None:  # fmt: skip
    """Train in place until `deadline`; the module ends up holding the averaged weights."""
    vae.train()
    model = FlatModel(vae, world, lr=config["lr"], betas=(0.9, 0.99), weight_decay=config["weight_decay"],
                      channels_last=world.cuda)  # fmt: skip
    ema, clock = Ema(model), Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    flops = 3.0 * forward_flops(vae, pool.images.shape[-1])
    meter = Meter(log, "vae", config["batch"] * world.size, flops, world.device.type, world.size)
    generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)
    weights = config["weights"]

    def work(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(world):
            found = terms(vae, x, config["noise"])
        loss = sum(weights[name] * value for name, value in found.items())
        loss.backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in found.items()}}

    # Blocks rather than the whole: blocks of one width and size share their compiled code, which halves the wait.
    blocks = [module for module in vae.modules() if isinstance(module, ResBlock | EfficientViTBlock)]
    with compiled(blocks, config["compile"] and world.cuda) as attempt:
        running = True
        while running:
            x = batch(pool, wide, config["batch"], config["wide_part"], generator)
            if world.cuda:
                x = x.contiguous(memory_format=torch.channels_last)
            model.zero_grad()
            found = attempt(lambda x=x: work(x), model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(**found, norm=norm)
            running = clock.tick()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7))
    model.flat.copy_(ema.flat)
    model.broadcast()
    vae.eval()


@torch.no_grad()
def reconstruct(vae: AutoencoderDC, pictures: torch.Tensor, world: World, noise: float = 0.0) -> torch.Tensor:
    """Pictures uint8 (B, 3, S, S) through the autoencoder, with noise of `noise` times the latents' spread: [-1, 1]."""
    with autocast(world):
        z = vae.encoder(to_input(pictures))
        y = vae.decoder(z + noise * z.float().square().mean().sqrt().to(z.dtype) * torch.randn_like(z))
    return y.float().clamp(-1, 1)


@torch.no_grad()
def psnr(vae: AutoencoderDC, pictures: torch.Tensor, world: World, noise: float = 0.0, size: int = 32) -> float:
    """Mean PSNR in dB of reconstructions."""
    total = 0.0
    for part in pictures.split(size):
        error = ((reconstruct(vae, part, world, noise) - to_input(part)) / 2).square().mean(dim=(1, 2, 3))
        total += float((-10 * torch.log10(error.clamp(min=1e-10))).sum())
    return round(total / len(pictures), 2)


@torch.no_grad()
def measure_scale(vae: AutoencoderDC, pool: Pool, world: World, size: int) -> float:
    """The scaling_factor that brings the latents to mean square 1, over some of the pictures."""
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    for part in pool.images[:2048].split(size):
        with autocast(world):
            z = vae.encoder(to_input(part)).double()
        sums += torch.stack([z.square().sum(), z.new_tensor(float(z.numel()))])
    world.average(sums)
    return float((sums[1] / sums[0].clamp(min=1e-12)).sqrt())


@torch.no_grad()
def encode_pool(vae: AutoencoderDC, pool: Pool, world: World, size: int) -> None:
    """Fill `pool.latents` and drop the pictures."""
    found = []
    for part in pool.images.split(size):
        with autocast(world):
            found.append((vae.encoder(to_input(part)).float() * vae.config.scaling_factor).bfloat16())
    pool.latents, pool.images = torch.cat(found), None
