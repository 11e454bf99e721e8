"""One line from a 4-bit checkpoint to a diffusers or transformers model.

transformer = SVDQuantFluxTransformer.from_pretrained("nunchaku-tech/nunchaku-flux.1-dev/svdq-int4_r32-flux.1-dev.safetensors")
pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=transformer, dtype=torch.bfloat16)
"""  # noqa: E501 - two lines to be copied

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.checkpoint.hub import resolve
from engine.devices import pick_device
from engine.errors import ArgumentError

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
    from transformers import T5EncoderModel

__all__ = ["SVDQuantFluxTransformer", "SVDQuantSanaTransformer", "SVDQuantT5Encoder"]

Progress = Callable[[int, int], None]


class SVDQuantFluxTransformer:
    """Loads FLUX.1 checkpoints; never instantiated, since what comes out is diffusers' own class."""

    @staticmethod
    def from_pretrained(
        place: str | Path,
        *,
        device: str | torch.device = "auto",
        activation: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        torch_dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> FluxTransformer2DModel:
        """Open a 4-bit FLUX.1 checkpoint of any layout and return a FluxTransformer2DModel with replaced linears.

        `place` is a file, a folder, `owner/repo/file.safetensors` or `owner/repo` on the hub. `activation` is "auto",
        "w4a4" or "w4a8". `torch_dtype` is diffusers' older name of `dtype`; where both are given it counts. `progress`
        is told (layers done, layers in all). Raises CheckpointError, ModelError (hub), BackendError (nothing here can
        run it) or ArgumentError.
        """
        from diffusers import FluxTransformer2DModel

        from engine.models import flux

        return _load(place, FluxTransformer2DModel, flux, device, activation, torch_dtype or dtype, progress)


class SVDQuantSanaTransformer:
    """Loads SANA checkpoints; never instantiated, since what comes out is diffusers' own class."""

    @staticmethod
    def from_pretrained(
        place: str | Path,
        *,
        device: str | torch.device = "auto",
        activation: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        torch_dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> SanaTransformer2DModel:
        """Open a 4-bit SANA checkpoint and return a SanaTransformer2DModel; arguments and errors as for FLUX."""
        from diffusers import SanaTransformer2DModel

        from engine.models import sana

        return _load(place, SanaTransformer2DModel, sana, device, activation, torch_dtype or dtype, progress)


class SVDQuantT5Encoder:
    """Loads 4-bit T5 encoders; never instantiated, since what comes out is transformers' own class."""

    @staticmethod
    def from_pretrained(
        place: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype = torch.bfloat16,
        torch_dtype: torch.dtype | None = None,
    ) -> T5EncoderModel:
        """Open a 4-bit T5 encoder (weight-only, 16-bit activations); arguments and errors as for FLUX."""
        from engine import ops
        from engine.models.t5 import load_t5

        where = pick_device(device)
        backend = ops.backends.select(where).name
        return load_t5(resolve(place), backend=backend, device=where, dtype=torch_dtype or dtype)  # pyright: ignore[reportReturnType]


def _load(
    place: str | Path,
    model_class: type,
    family: Any,
    device: str | torch.device,
    activation: str,
    dtype: torch.dtype,
    progress: Progress | None,
) -> Any:
    from engine import ops
    from engine.linear import resolve_activation
    from engine.models.install import load_quantized

    where = pick_device(device)
    if dtype not in (torch.bfloat16, torch.float16):
        raise ArgumentError(f"dtype: expected torch.bfloat16 or torch.float16, got {dtype}")
    return load_quantized(
        resolve(place),
        model_class,
        family,
        backend=ops.backends.select(where).name,
        activation=resolve_activation(activation, where),
        device=where,
        dtype=dtype,
        progress=progress,
    )
