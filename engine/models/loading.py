"""Open transformers and pipelines from a folder or the hub, with errors that say what to do next."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from engine.errors import CheckpointError, ModelError
from engine.linear import Activation
from engine.models.catalogue import ModelSpec
from engine.models.families import family, runner

__all__ = ["LOADING", "add_lora", "bf16_transformer", "parts", "pipeline", "quantized_transformer"]

DTYPE = torch.bfloat16
# Held by whoever opens a model: while they do, diffusers and transformers change torch's modules for all threads, and
# a model that another thread opens meanwhile ends up partly on the meta device.
LOADING = threading.RLock()


def bf16_transformer(spec: ModelSpec, device: torch.device) -> Any:
    """Load the 16-bit transformer of `spec` onto `device`."""
    transformer_class = family(spec.family).transformer_class
    with _explained(spec):
        model = transformer_class.from_pretrained(spec.source, subfolder="transformer", dtype=DTYPE)
    return model.to(device).eval().requires_grad_(False)


def quantized_transformer(
    spec: ModelSpec,
    precision: str,
    backend: str,
    activation: Activation,
    device: torch.device,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Load a 4-bit transformer of `spec` onto `device`, its linears re-tiled for `backend`."""
    from engine.models.install import load_quantized

    path, row = _checkpoint_path(spec, precision, progress), family(spec.family)
    return load_quantized(
        path, row.transformer_class, row.leaves, backend=backend, activation=activation, device=device, dtype=DTYPE
    )


def add_lora(spec: ModelSpec, transformer: Any) -> None:
    """Put the LoRA that makes `transformer` this model's onto it; nothing where the spec has none.

    Raises ModelError when the file is not there, CheckpointError when it does not fit.
    """
    if not spec.lora:
        return
    from engine.lora import load_lora

    if Path(spec.lora).is_absolute() and not Path(spec.lora).is_file():
        raise ModelError(f"{spec.lora}: the LoRA of {spec.title} is not there; fetch the folder again")
    load_lora(transformer, spec.lora, name=spec.name)
    transformer.register_to_config(
        in_channels=transformer.x_embedder.in_features, out_channels=transformer.out_channels
    )


def pipeline(
    spec: ModelSpec, transformer: Any, device: torch.device, share: Any | None, home: torch.device | None = None
) -> Any:
    """Put `transformer` into the diffusers pipeline of `spec`; encoders and VAE come from `share` if given.

    Networks lie on `home`, which is the device itself unless they only come to it (engine.residency).
    """
    home = home or device
    import diffusers

    pipeline_class = getattr(diffusers, spec.pipeline)
    if share is not None:
        # The scheduler holds the state of a run, so each engine has its own.
        scheduler = share.scheduler.from_config(share.scheduler.config)
        pipe = pipeline_class(**{**share.components, "transformer": transformer, "scheduler": scheduler})
    else:
        own = {"text_encoder_2": _four_bit_t5(spec, transformer, device, home)} if spec.text_encoder else {}
        with _explained(spec):
            pipe = pipeline_class.from_pretrained(spec.source, transformer=transformer, **own, dtype=DTYPE)
        for part in parts(pipe).values():
            if part is not transformer:
                part.to(home).eval().requires_grad_(False)
        if device.type == "cpu":
            settle_vae_on_cpu(pipe.vae)
    pipe.set_progress_bar_config(disable=True)
    with _explained(spec):
        runner(spec).settle(pipe, spec, home, share)
    return pipe


def _four_bit_t5(spec: ModelSpec, transformer: Any, device: torch.device, home: torch.device) -> Any:
    from engine import ops
    from engine.checkpoint.hub import resolve
    from engine.models.t5 import load_t5

    if spec.family != "flux":
        raise ModelError(f"{spec.title} has no T5 text encoder that {spec.text_encoder} could stand in for")
    encoder: Any = load_t5(
        resolve(spec.text_encoder), backend=ops.backends.select(device).name, device=home, dtype=DTYPE
    )
    found, wanted = encoder.config.d_model, transformer.config.joint_attention_dim
    if found != wanted:
        raise ModelError(f"{spec.text_encoder}: a T5 of width {found}; {spec.title} takes one of width {wanted}")
    return encoder


def parts(pipe: Any) -> dict[str, torch.nn.Module]:
    """The networks of a pipeline, those of its prior too, by name."""
    found = {**getattr(getattr(pipe, "prior", None), "components", {}), **pipe.components}
    return {name: part for name, part in found.items() if isinstance(part, torch.nn.Module)}


def settle_vae_on_cpu(vae: torch.nn.Module) -> None:
    """Give the VAE the number format in which this CPU is fast.

    With BF16 instructions that is BF16, channels last: 45 ms a picture of 256x256 instead of 103 on two Zen 4 cores,
    65 dB from the float32 picture. Without them BF16 convolutions are many times slower than float32's.
    """
    if has_bf16_instructions():
        vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    else:
        torch.nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns of what it does not do
        _mind_formats(vae)


def _mind_formats(vae: torch.nn.Module) -> None:
    """Let a float32 VAE read pictures of any format and give latents in the transformer's.

    The pipelines that encode a picture (Control, Fill) take VAE and transformer to be of one format.
    """
    encoder = getattr(vae, "encoder", None)
    if encoder is None:
        return
    last = getattr(vae, "quant_conv", None) or encoder
    encoder.register_forward_pre_hook(lambda _module, given: (given[0].float(), *given[1:]))
    last.register_forward_hook(lambda _module, _given, latents: latents.to(DTYPE))


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies BF16 itself (AVX512-BF16; processors with AMX have it too)."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(known and known())


def _checkpoint_path(spec: ModelSpec, precision: str, progress: Callable[[str], None] | None) -> Path:
    place = spec.checkpoints[precision]
    path = Path(place)
    if path.exists():
        return path
    if spec.makes(precision):
        from engine.quantize.made import nvfp4

        return nvfp4(spec, progress)
    if path.is_absolute() or place.count("/") != 2:
        raise CheckpointError(
            f"{place}: the {precision} checkpoint of {spec.name} is not there; make it with"
            f" python -m engine.quantize {spec.source} --precision {precision} --out {place}"
        )
    from huggingface_hub import hf_hub_download

    owner, name, file = place.split("/")
    with _explained(spec):
        return Path(hf_hub_download(f"{owner}/{name}", file))


@contextlib.contextmanager
def _explained(spec: ModelSpec) -> Iterator[None]:
    """Turn the ways a download or a folder can fail into one sentence."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{spec.source} is gated: accept its licence on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{spec.source}: no such model on the hub, or it is private; check the name") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if spec.local:
            raise ModelError(
                f"{spec.source}: cannot be opened ({_first_line(error)}); fetch the folder again"
            ) from error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"{spec.source}: not on this machine and the hub does not answer{offline}: {_first_line(error)}."
            " Connect once to download it, give a local folder, or use --model tiny, which ships with the project"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
