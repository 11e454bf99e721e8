"""Stage: the autoencoder, then the pool's pictures as latents.

Loss: L1 and squared error on the picture and on its 2x and 4x reductions, L1 on its gradients, and a KL term large
enough that latents carry noise (about a tenth of their spread), which keeps the latent space smooth for a small model.
Three pictures in sixteen give way to what later models feed it: depth maps, edge maps, pictures with holes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from zoo.train.dist import World
from zoo.train.flow import pack
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.pool import Pool


def to_input(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, S, S) to float32 in [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1.0)


def edges(x: torch.Tensor) -> torch.Tensor:
    """White lines on black where a picture in [-1, 1] changes quickly; a stand-in for Canny's. (B, 3, S, S)."""
    grey = x.mean(1, keepdim=True)
    dx, dy = F.pad(grey[..., 1:] - grey[..., :-1], (0, 1)), F.pad(grey[..., 1:, :] - grey[..., :-1, :], (0, 0, 0, 1))
    return ((dx.square() + dy.square()).sqrt() > 0.12).float().mul(2).sub(1).expand_as(x)


def batch(pool: Pool, size: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures to reconstruct, (size, 3, S, S) in [-1, 1]."""
    draw = lambda n, high: torch.randint(high, (n,), generator=generator, device=generator.device)  # noqa: E731
    x = to_input(pool.images[draw(size, len(pool))])
    part = size * 3 // 16
    if part and len(pool.depth):
        third = max(1, part // 3)
        x[:third] = to_input(pool.depth[draw(third, len(pool.depth))][:, None].expand(-1, 3, -1, -1))
        x[third : 2 * third] = edges(x[third : 2 * third])
        for row in range(2 * third, part):
            top, left, high, wide = (int(v * x.shape[-1]) for v in torch.rand(4) * 0.5)
            x[row, :, top : top + high, left : left + wide] = 0.0  # a grey hole, as inpainting models see
    return x


def loss_terms(x: torch.Tensor, y: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means over elements, float32: `l1`, `l2`, `edge` of the picture, `multi` of its reductions, latents' `kl`."""
    d = y.float() - x
    half, quarter = F.avg_pool2d(d, 2), F.avg_pool2d(d, 4)
    dx, dy = d[..., 1:] - d[..., :-1], d[..., 1:, :] - d[..., :-1, :]
    return {
        "l1": d.abs().mean(), "l2": d.square().mean(), "edge": dx.abs().mean() + dy.abs().mean(),
        "multi": half.abs().mean() + quarter.abs().mean(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean(),
    }  # fmt: skip


def moments(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and log variance, float32, of pictures in [-1, 1]. The model has no quant_conv."""
    mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
    return mean, logvar.clamp(-20.0, 10.0)


@torch.no_grad()
def forward_flops(vae: AutoencoderKL, size: int) -> float:
    """Floating-point operations of one picture's encoding and decoding, counted on the meta device."""
    shadow = AutoencoderKL.from_config(vae.config).to("meta")
    with FlopCounterMode(display=False) as counter:
        latent = shadow.encoder(torch.empty(1, 3, size, size, device="meta"))
        shadow.decoder(latent.chunk(2, dim=1)[0])
    return float(counter.get_total_flops())


def train(vae: AutoencoderKL, pool: Pool, config: dict, world: World, log: Log, deadline: float, seed: int,
          max_steps: int | None = None) -> None:  # fmt: skip
    """Train in place until `deadline`; the module ends up holding the averaged weights."""
    vae.train()
    model = FlatModel(vae, world, lr=config["lr"], betas=(0.9, 0.99), weight_decay=config["weight_decay"], clip=1.0,
                      channels_last=world.cuda)  # fmt: skip
    ema, clock = Ema(model), Clock(world, deadline, warmup=config["warmup"], max_steps=max_steps)
    flops = 3.0 * forward_flops(vae, pool.images.shape[-1])
    meter = Meter(log, "vae", config["batch"] * world.size, flops, world.device.type, world.size)
    generator = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank)
    weights = config["weights"]

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        with autocast(world):
            mean, logvar = moments(vae, x)
            z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator, device=x.device)
            return loss_terms(x, vae.decoder(z), mean, logvar)

    with compiled([vae.encoder, vae.decoder], config["compile"]) as attempt:
        running = True
        while running:
            x = batch(pool, config["batch"], generator)
            if world.cuda:
                x = x.contiguous(memory_format=torch.channels_last)
            model.zero_grad()
            terms = attempt(lambda x=x: _backward(forward(x), weights), model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(**terms, norm=norm)
            running = clock.tick()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7))
    model.flat.copy_(ema.flat)
    model.broadcast()
    vae.eval()


def _backward(terms: dict[str, torch.Tensor], weights: dict[str, float]) -> dict[str, torch.Tensor]:
    loss = sum(weights[name] * value for name, value in terms.items())
    loss.backward()
    return {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}


@torch.no_grad()
def validate(vae: AutoencoderKL, pictures: torch.Tensor, world: World, size: int = 32) -> dict[str, float]:
    """Mean PSNR in dB over pictures (uint8, P of them), decoded from the posterior mean and from a draw from it."""
    total = {"psnr": 0.0, "psnr_drawn": 0.0}
    for part in pictures.split(size):
        x = to_input(part)
        with autocast(world):
            mean, logvar = moments(vae, x)
            drawn = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            pairs = {"psnr": vae.decoder(mean), "psnr_drawn": vae.decoder(drawn)}
        for name, y in pairs.items():
            error = ((y.float().clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
            total[name] += float((-10 * torch.log10(error.clamp(min=1e-10))).sum())
    return {name: round(value / len(pictures), 2) for name, value in total.items()}


@torch.no_grad()
def measure_scale(vae: AutoencoderKL, pool: Pool, world: World, size: int) -> tuple[float, float]:
    """(scaling_factor, shift_factor) that bring the latents to mean 0 and deviation 1, over some of the pictures."""
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for part in pool.images[: min(len(pool), 2048)].split(size):
        with autocast(world):
            mean, logvar = moments(vae, to_input(part))
        sums += torch.stack([mean.sum(), (mean.square() + logvar.exp()).sum(), torch.ones_like(mean).sum()])
    world.average(sums)
    mean, square = (sums[:2] / sums[2]).tolist()
    return 1.0 / math.sqrt(max(1e-8, square - mean * mean)), mean


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: Pool, world: World, size: int) -> None:
    """Fill `pool.mean` and `pool.std` with packed, scaled latents and drop the pictures."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    means, stds = [], []
    form = torch.channels_last if world.cuda else torch.contiguous_format  # what 16-bit convolutions are quick in
    torch.nn.Module.to(vae, memory_format=form)
    for part in pool.images.split(size):
        with autocast(world):
            mean, logvar = moments(vae, to_input(part).contiguous(memory_format=form))
        means.append(pack((mean - shift) * scale).bfloat16())
        stds.append(pack((0.5 * logvar).exp() * scale).bfloat16())
    pool.mean, pool.std = torch.cat(means), torch.cat(stds)
    pool.images = pool.depth = None
