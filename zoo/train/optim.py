"""Optimizer parts built on one flat buffer: AdamW, gradient clipping and averaging, EMA, a clock-tied learning rate.

All parameters, and all gradients, are views into one float32 buffer each. So averaging over processes is one
all-reduce, the EMA one lerp and the norm one reduction, whatever the model: no wrapper around it, no hooks in it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

import torch
from torch import nn

from zoo.train.dist import World

_PROBED = 8
_ALIGN = 64  # elements: each parameter starts on a 256-byte border, which compiled kernels may rely on


def _view(flat: torch.Tensor, offset: int, like: torch.Tensor, channels_last: bool) -> torch.Tensor:
    part = flat[offset : offset + like.numel()]
    if channels_last and like.ndim == 4:
        o, i, h, w = like.shape
        return part.view(o, h, w, i).permute(0, 3, 1, 2)
    return part.view(like.shape)


class FlatModel:
    """Moves a module's trainable parameters and their gradients into flat buffers and steps AdamW on them.

    Weight decay acts on matrices and convolutions only. `broadcast` gives all processes the same values.
    """

    def __init__(self, module: nn.Module, world: World, *, lr: float, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0,
                 channels_last=False):  # fmt: skip
        self.world, self.lr, self.clip, self.steps = world, lr, clip, 0
        params = [p for p in module.parameters() if p.requires_grad]
        decayed = [p for p in params if p.ndim >= 2]
        plain = [p for p in params if p.ndim < 2]
        size = lambda group: sum(-(-p.numel() // _ALIGN) * _ALIGN for p in group)  # noqa: E731
        border, total = size(decayed), size(params)
        self.flat = torch.zeros(total, device=world.device)
        self.grad = torch.zeros_like(self.flat)
        offset = 0
        for p in decayed + plain:
            view = _view(self.flat, offset, p, channels_last)
            view.copy_(p.data)
            p.data, p.grad = view, _view(self.grad, offset, p, channels_last)
            offset += -(-p.numel() // _ALIGN) * _ALIGN
        groups = []
        for start, stop, decay in ((0, border, weight_decay), (border, total, 0.0)):
            if stop > start:
                leaf = nn.Parameter(self.flat[start:stop])
                leaf.grad = self.grad[start:stop]
                groups.append({"params": [leaf], "weight_decay": decay})
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=world.device.type == "cuda")
        self.broadcast()

    def broadcast(self) -> None:
        """Give every process rank 0's weights."""
        self.world.broadcast(self.flat)

    def zero_grad(self) -> None:
        self.grad.zero_()

    @contextlib.contextmanager
    def holding(self, weights: torch.Tensor) -> Iterator[None]:
        """Within this context the module holds `weights`, a copy of `flat` made at some other time."""
        kept = self.flat.clone()
        self.flat.copy_(weights)
        try:
            yield
        finally:
            self.flat.copy_(kept)

    def step(self, factor: float) -> torch.Tensor:
        """Average the gradients, clip them, step at `factor` times the learning rate. Returns the norm, 0-d.

        A gradient with a NaN or an infinity in it is dropped whole, without waiting for the device to say so; only in
        the `_PROBED`th step, when scaling has settled, is one an error, lest a broken kernel cost the whole run.
        """
        self.world.average(self.grad)
        norm = self.grad.norm()
        self.steps += 1
        if self.steps == _PROBED and not bool(torch.isfinite(norm)):
            raise FloatingPointError(f"the gradient of step {self.steps} is not finite ({float(norm)})")
        scale = torch.where(torch.isfinite(norm), (self.clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        self.grad.nan_to_num_(0.0, 0.0, 0.0).mul_(scale)
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor
        self.adam.step()
        return norm


class Ema:
    """Power-function average of a FlatModel's weights (Karras et al. 2024, arXiv 2312.02696, section 3.1).

    Its width is a fixed part of the steps done so far, so it needs no tuning to a run's unknown length:
    exponent 16.97 is a width of 5 %, 6.94 of 10 %.
    """

    def __init__(self, model: FlatModel, exponent: float = 16.97) -> None:
        self.model, self.exponent, self.steps = model, exponent, 0
        self.flat = model.flat.clone()

    def update(self) -> None:
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.exponent + 1)
        self.flat.lerp_(self.model.flat, 1 - beta)

    def swapped(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the module holds the averaged weights."""
        return self.model.holding(self.flat)


class Clock:
    """Progress of a stage from 0 to 1 by the wall clock, the same in every process.

    Rank 0's clock counts. The first `burn` steps (compilation) happen at progress 0, so that a slow compiler costs
    steps but leaves the learning-rate curve whole. With `max_steps` progress counts steps too, whichever is ahead.
    """

    def __init__(self, world: World, deadline: float, *, warmup: int, max_steps: int | None = None, burn: int = 3,
                 every: int = 10) -> None:  # fmt: skip
        self.world, self.deadline, self.warmup, self.max_steps = world, deadline, max(1, warmup), max_steps
        self.burn, self.every = burn, every
        self.step, self.progress, self.started = 0, 0.0, time.time()

    def tick(self) -> bool:
        """Count a step. True while there is time for another one."""
        self.step += 1
        if self.step == self.burn:
            self.started = time.time()
        if self.step % self.every == 0 or self.step <= self.burn or self.max_steps is not None:
            self.progress = self.world.agree(self._own_progress())
        return self.progress < 1.0

    def _own_progress(self) -> float:
        now, done = time.time(), 0.0
        if now >= self.deadline:
            return 1.0
        if self.step > self.burn:
            done = (now - self.started) / max(1e-6, self.deadline - self.started)
        if self.max_steps is not None:
            done = max(done, self.step / self.max_steps)
        return min(1.0, done)

    @property
    def factor(self) -> float:
        """Learning-rate factor: linear warm-up over `warmup` steps, then half a cosine down to 0.01."""
        return min(1.0, (self.step + 1) / self.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))
