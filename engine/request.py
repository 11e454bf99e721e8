"""What a caller asks for and what comes back: plain values that any thread may keep."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.models.catalogue import ModelSpec, Range
from engine.placing import writing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["MAX_PROMPT_CHARACTERS", "MAX_SEED", "METADATA_KEY", "Request", "Result", "Step", "read_metadata"]

MAX_PROMPT_CHARACTERS = 4000
MAX_SEED = 2**32 - 1
METADATA_KEY = "nibble"
LORA_STRENGTHS = (-4.0, 4.0)
# What a 4-bit FLUX can hold attention's probabilities and values in; "auto": in 8 bits where that pays most.
ATTENTIONS = ("auto", "16bit", "8bit")


@dataclass(frozen=True)
class Request:
    """One picture to make. Fields left at None take the model's own default.

    `width` and `height` are pixels, multiples of the model's size step. `inputs` holds what a pipeline takes beyond
    text (a control image, a mask ...), by the pipeline's own argument names. `loras` maps LoRA files, or hub names
    `owner/repo/file.safetensors`, to their strengths; their order counts for the last bits.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, float] = field(default_factory=dict)

    def resolved(self, spec: ModelSpec) -> Request:
        """Return this request with defaults filled in and every field checked against `spec`.

        Raises RequestError naming the field, what was expected and what came.
        """
        full = replace(
            self,
            steps=spec.steps.default if self.steps is None else self.steps,
            guidance=(spec.guidance.default if spec.guidance else 0.0) if self.guidance is None else self.guidance,
            width=spec.size.default if self.width is None else self.width,
            height=spec.size.default if self.height is None else self.height,
        )
        _check_prompt(full.prompt, spec.prompt_needed)
        guidance = _check_number("guidance", full.guidance, spec.guidance) if spec.guidance else 0.0
        for lora, strength in full.loras.items():
            _check_number(f"loras[{_short(lora)}]", strength, Range(1, *LORA_STRENGTHS))
        return replace(
            full,
            seed=_check_whole("seed", full.seed, Range(0, 0, MAX_SEED)),
            steps=_check_whole("steps", full.steps, spec.steps),
            guidance=guidance,
            width=_check_whole("width", full.width, spec.size),
            height=_check_whole("height", full.height, spec.size),
        )


@dataclass(frozen=True)
class Step:
    """One finished denoising step: `index` counts from 1 to `total`; `seconds` since denoising began.

    `preview`, where there is one, draws a small picture of where the run leads; its time is not counted as the run's.
    """

    index: int
    total: int
    seconds: float
    preview: Callable[[], Image.Image | None] | None = None


@dataclass(frozen=True)
class Result:
    """A picture and what it cost.

    `seconds` is the whole run (encode + denoise + decode, no warm-up); `ms_per_step` is denoising alone;
    `weight_bytes` is the transformer in memory; `peak_bytes` is what the run needed at its highest point: on a GPU
    the allocator's peak, on a CPU this engine's weights plus the growth of resident memory during the run.
    """

    image: Image.Image
    request: Request
    model: str
    precision: str
    activation: str
    backend: str
    device: str
    seconds: float
    ms_per_step: float
    stages: Mapping[str, float]
    weight_bytes: int
    peak_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    attention: str | None = None  # of a model that can hold it in 16 bits or in 8, which
    wide_weights: bool = False

    @property
    def seed(self) -> int:
        """Seed the noise was drawn from."""
        return self.request.seed

    def settings(self, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All that is needed to make this very picture again; no timings, so equal pictures carry equal text.

        `own` are an app's further settings (plain numbers and words), kept under "controls".
        """
        request = self.request
        more: dict[str, Any] = {"controls": dict(own)} if own else {}
        if request.loras:
            more["loras"] = {_short(lora): strength for lora, strength in request.loras.items()}
        if self.attention is not None:
            more["attention"] = self.attention
        if self.wide_weights:
            more["wide_weights"] = True
        return more | {
            "prompt": request.prompt,
            "seed": request.seed,
            "steps": request.steps,
            "guidance": request.guidance,
            "width": request.width,
            "height": request.height,
            "model": self.model,
            "precision": self.precision,
            "activation": self.activation,
            "backend": self.backend,
            "versions": dict(self.versions),
        }

    def measurements(self) -> dict[str, Any]:
        """What the run cost: seconds, milliseconds a step, bytes."""
        return {
            "seconds": self.seconds,
            "ms_per_step": self.ms_per_step,
            "stages": dict(self.stages),
            "weight_bytes": self.weight_bytes,
            "peak_bytes": self.peak_bytes,
            "device": self.device,
        }

    def save(self, path: str | Path, own: Mapping[str, Any] | None = None) -> Path:
        """Write a PNG that carries `settings(own)`; written to a temporary file first, then renamed."""
        from PIL.PngImagePlugin import PngInfo

        path = Path(path)
        info = PngInfo()
        info.add_itxt(METADATA_KEY, json.dumps(self.settings(own), ensure_ascii=False))
        with writing(path) as file:
            self.image.save(file, format="PNG", pnginfo=info)
        return path


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return the settings a PNG of this project carries, or None when it carries none."""
    from PIL import Image

    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except ValueError:
        return None
    return settings if isinstance(settings, dict) else None


def _short(lora: str) -> str:
    """A LoRA's name without the folders of this machine."""
    return Path(lora).name if Path(lora).is_absolute() else lora


def _check_prompt(prompt: object, needed: bool) -> None:
    if not isinstance(prompt, str):
        raise RequestError("prompt", f"prompt: expected text, got {type(prompt).__name__}")
    if needed and not prompt.strip():
        raise RequestError("prompt", "prompt: expected a description of the picture, got an empty text")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise RequestError("prompt", f"prompt: expected at most {MAX_PROMPT_CHARACTERS} characters, got {len(prompt)}")


def _check_number(name: str, value: object, limits: Range) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not limits.low <= value <= limits.high:  # pyright: ignore[reportOperatorIssue]
        raise RequestError(name, f"{name}: expected a number from {limits.low:g} to {limits.high:g}, got {value!r}")
    return float(value)  # pyright: ignore[reportArgumentType]


def _check_whole(name: str, value: object, limits: Range) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
    multiple = "" if limits.step == 1 else f", a multiple of {limits.step:g}"
    if not whole or not limits.low <= value <= limits.high or value % limits.step:  # pyright: ignore
        raise RequestError(
            name, f"{name}: expected a whole number from {limits.low:.0f} to {limits.high:.0f}{multiple}, got {value!r}"
        )
    return int(value)  # pyright: ignore[reportArgumentType]
