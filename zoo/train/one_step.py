"""Losses of the one-step sketch model: to the picture's latents, to its pixels, and of a critic in latent space.

The picture is one stride from noise, x_0 = noisy - v. Plain regression fits colours and outlines but blurs what a
prompt leaves open (floor, light, highlights); a patch critic that sees latents beside the drawing's asks for sharpness.
Gradients meet at x_0, the others scaled to parts of the latent regression's, so no weight needs tuning.
Shapes: B batch, N tokens, h = w latent cells, k pictures that are decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from zoo.train import flow
from zoo.train.dist import World
from zoo.train.graph import autocast
from zoo.train.optim import FlatModel
from zoo.train.vae import loss_terms, to_input

PIXELS = {"l1": 1.0, "l2": 1.0, "edge": 0.5, "multi": 0.5}


class Critic(nn.Module):
    """Latents (B, 16, h, w) of a picture and of its drawing to scores of patches, (B, P): high for real pictures."""

    def __init__(self, channels: int = 16, width: int = 96) -> None:
        super().__init__()
        norm = lambda layer: nn.utils.parametrizations.spectral_norm(layer)  # noqa: E731
        self.near = nn.Sequential(
            norm(nn.Conv2d(2 * channels, width, 3, padding=1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.far = nn.Sequential(
            norm(nn.Conv2d(2 * width, 3 * width, 4, 2, 1)), nn.LeakyReLU(0.2),
            norm(nn.Conv2d(3 * width, 3 * width, 3, padding=1)), nn.LeakyReLU(0.2),
        )  # fmt: skip
        self.heads = nn.ModuleList([nn.Conv2d(2 * width, 1, 3, padding=1), nn.Conv2d(3 * width, 1, 3, padding=1)])

    def forward(self, picture: torch.Tensor, drawing: torch.Tensor) -> torch.Tensor:
        near = self.near(torch.cat([picture, drawing], 1))
        far = self.far(near)
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, (near, far), strict=True)], 1)


class Adversary:
    """A critic and its training: hinge loss, and smoothness at real pictures by finite differences (as in APT)."""

    def __init__(self, config: dict, world: World, seed: int) -> None:
        torch.manual_seed(seed + 11)
        self.critic = Critic(width=config["critic_width"]).to(world.device)
        self.model = FlatModel(
            self.critic, world, lr=config["critic_lr"], betas=(0.0, 0.99), weight_decay=0.0, clip=10.0
        )
        self.smooth = config["smooth"]

    def work(self, b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the critic's gradient; "real", "fake", "drawing" and "noise", all (B, 16, h, w). The hinge loss, 0-d."""
        near = b["real"] + 0.05 * b["noise"]
        scores = self.critic(torch.cat([b["real"], b["fake"], near]), b["drawing"].repeat(3, 1, 1, 1))
        on_real, on_fake, on_near = scores.chunk(3)
        hinge = F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()
        (hinge + self.smooth * (on_real - on_near).square().mean()).backward()
        return {"critic": hinge.detach()}

    def gradient(self, fake: torch.Tensor, drawing: torch.Tensor) -> torch.Tensor:
        """What would make `fake` (B, 16, h, w) look more real: the gradient of the loss by it."""
        y = fake.detach().requires_grad_()
        return torch.autograd.grad(-self.critic(y, drawing).mean(), y)[0]


def latent_loss(x0: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error in scaled latents, a 0-d tensor."""
    d = x0 - wanted
    return d.abs().mean() + 0.5 * d.square().mean()


def pixel_loss(vae: AutoencoderKL, x0: torch.Tensor, pictures: torch.Tensor, world: World) -> torch.Tensor:
    """Error of decoded latents (k, 16, h, w) against pictures (k, 3, S, S) uint8, a 0-d tensor."""
    z = x0 / vae.config.scaling_factor + vae.config.shift_factor
    if world.cuda:
        z = z.contiguous(memory_format=torch.channels_last)
    with autocast(world):
        decoded = vae.decoder(z)
    zero = torch.zeros(1, device=x0.device)
    terms = loss_terms(to_input(pictures), decoded, zero, zero)
    return sum(weight * terms[name] for name, weight in PIXELS.items())


def gradient(
    vae: AutoencoderKL,
    x0: torch.Tensor,
    wanted: torch.Tensor,
    pictures: torch.Tensor | None,
    pull: torch.Tensor | None,
    parts: dict[str, float | torch.Tensor],
    world: World,
) -> tuple[torch.Tensor, dict]:
    """The gradient to send back from x0 (B, 16, h, w), and the losses for the log.

    pictures: of the first k rows, uint8, or None while only latents count. pull: the critic's gradient. Each of the two
    is brought to its share of the latent loss's gradient over the same rows: parts["pixel"], parts["critic"].
    """
    y = x0.detach().requires_grad_()
    latent = latent_loss(y, wanted)
    g = torch.autograd.grad(latent, y)[0]
    total, terms = g.clone(), {"loss": latent.detach()}
    if pictures is not None:
        k = len(pictures)
        some = x0[:k].detach().requires_grad_()
        pixel = pixel_loss(vae, some, pictures, world)
        total[:k] += _scaled(torch.autograd.grad(pixel, some)[0], g[:k], parts["pixel"])
        terms["pixel"] = pixel.detach()
    if pull is not None:
        total += _scaled(pull, g, parts["critic"])
    return total, terms


def _scaled(g: torch.Tensor, like: torch.Tensor, part: float | torch.Tensor) -> torch.Tensor:
    return g * (part * like.norm() / g.norm().clamp(min=1e-12))


def strengths(n: int, generator: torch.Generator) -> torch.Tensor:
    """Alphas to train at, (n,): most where users keep the slider, low ones above all, the others over all of it.

    The lower, the harder: less of the drawing is left in the noise.
    """
    u = torch.rand(n, generator=generator, device=generator.device)
    usual = torch.rand(n, generator=generator, device=generator.device) < 0.7
    return torch.where(usual, 0.22 + 0.33 * u.square(), 0.12 + 0.88 * u)


def square(tokens: torch.Tensor) -> torch.Tensor:
    """Packed tokens of a square picture (B, N, 64) to latents (B, 16, h, w)."""
    side = 2 * round(tokens.shape[1] ** 0.5)
    return flow.unpack(tokens, side, side)
