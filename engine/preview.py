"""Small pictures of what a run is painting, at next to no cost: no decoder, one matrix.

After each step the two last latents tell where the path leads (the velocity between them is the model's own), and a
linear map from latent channels to colours, fitted once to the autoencoder in use, shows it at the size of the latents:
an eighth of FLUX's, a thirty-second of SANA's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from engine.request import Request

__all__ = ["Watch", "palette"]


class Watch:
    """Follows one run of a pipeline. `paused` is how many seconds its pictures took, which are not the run's."""

    def __init__(self, pipe: Any, request: Request) -> None:
        self.pipe, self.request = pipe, request
        self.paused = 0.0
        self._last: tuple[int, Tensor] | None = None
        self._before: Tensor | None = None

    def saw(self, index: int, latents: Tensor | None) -> None:
        """Step `index` (from 0) is done and left these latents, packed as (1, N, 64) or (1, C, h, w)."""
        self._before = self._last[1] if self._last is not None else None
        self._last = None if latents is None else (index, latents)

    def picture(self) -> Image | None:
        """Where the run leads, as small as the latents; None before the second step."""
        if self._last is None or self._before is None:
            return None
        if self._before.is_cuda:
            torch.cuda.synchronize(self._before.device)
        began = time.perf_counter()
        try:
            return self._picture(*self._last, self._before)
        finally:
            self.paused += time.perf_counter() - began

    def _picture(self, index: int, latents: Tensor, before: Tensor) -> Image:
        from PIL import Image

        now, earlier = (float(self.pipe.scheduler.sigmas[i]) for i in (index + 1, index))
        latents, before = latents.float(), before.float()
        clean = latents - now / (now - earlier) * (latents - before)
        config, request = self.pipe.vae.config, self.request
        # FLUX packs its latents into tokens; SANA leaves them as they are.
        unpack = getattr(self.pipe, "_unpack_latents", None)
        z = unpack(clean, request.height, request.width, self.pipe.vae_scale_factor) if unpack else clean
        z = z / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        weight, bias = palette(self.pipe.vae)
        colours = torch.einsum("chw,cr->hwr", z[0], weight) + bias
        return Image.fromarray(((colours / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().numpy())


@torch.no_grad()
def palette(vae: Any) -> tuple[Tensor, Tensor]:
    """The linear map from latents to colours (C, 3) and its offset (3) that fits this autoencoder best; made once.

    Fitted by least squares to smooth random pictures and their latents.
    """
    if not hasattr(vae, "_nibble_palette"):
        draw = torch.Generator().manual_seed(0)
        seeds = torch.rand(24, 3, 3, 3, generator=draw) * 2 - 1
        pictures = F.interpolate(seeds, (64, 64), mode="bilinear", align_corners=False)
        encoded = vae.encode(pictures.to(vae.device, vae.dtype))
        latents = (encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent).float()
        colours = F.adaptive_avg_pool2d(pictures.to(vae.device), latents.shape[-2:])
        known = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        known = torch.cat([known, known.new_ones(len(known), 1)], 1)
        wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3)
        # Ridge: channels that carry no colour stay near nought.
        square = known.T @ known + 1e-3 * len(known) * torch.eye(known.shape[1], device=known.device)
        found = torch.linalg.solve(square, known.T @ wanted)
        vae._nibble_palette = found[:-1], found[-1]
    return vae._nibble_palette
