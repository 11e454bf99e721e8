"""LoRAs that a visitor can put on the model: well-known ones, one from the hub, or an uploaded file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.common import controls
from apps.common.controls import Control
from engine import RequestError
from engine.models.catalogue import ModelSpec

if TYPE_CHECKING:
    from gradio.components import Component

__all__ = ["NONE", "PRESETS", "Preset", "choose", "wanted", "worded"]

NONE = "None"
LIMITS = (0.0, 2.0)
_MARK = "{prompt}"
# owner/repository, or a file in it; never a path of this machine.
_HUB = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(/[\w][\w.-]*)*")


@dataclass(frozen=True)
class Preset:
    """A LoRA on the hub, the words it wants around a prompt, and the models it was made for."""

    title: str
    place: str
    template: str
    models: tuple[str, ...]


_DEV = ("flux.1-dev",)
_COLLECTION = "mit-han-lab/FLUX.1-dev-LoRA-Collections"
PRESETS = (
    Preset("Anime", "alvdansen/sonny-anime-fixed/araminta_k_sonnyanime_fluxd_fixed.safetensors",
           f"{_MARK}, nm22 style", _DEV),
    Preset("GHIBSKY Illustration", "aleksa-codes/flux-ghibsky-illustration/lora.safetensors",
           f"GHIBSKY style, {_MARK}", _DEV),
    Preset("Realism", f"{_COLLECTION}/realism.safetensors", _MARK, _DEV),
    Preset("Yarn Art", "linoyts/yarn_art_Flux_LoRA/pytorch_lora_weights.safetensors", f"{_MARK}, yarn art style", _DEV),
    Preset("Children Sketch", f"{_COLLECTION}/sketch.safetensors", f"sketched style, {_MARK}", _DEV),
)  # fmt: skip


def choose() -> tuple[Control, Control, Control]:
    """Which LoRA, a file instead, and how strongly it counts."""

    def build(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.Dropdown(
            [NONE, *(preset.title for preset in PRESETS if spec.name in preset.models)],
            value=NONE,
            allow_custom_value=True,
            label="LoRA",
            info="One of these, or a hub name: owner/repository/file.safetensors",
            elem_id="nb-lora",
        )

    def build_file(spec: ModelSpec) -> Component:
        import gradio as gr

        return gr.File(
            label="LoRA from a file", file_types=[".safetensors"], type="filepath", height=120, elem_id="nb-lora_file"
        )

    return (
        Control(
            "lora", str, "A LoRA: the title of a known one, or owner/repository/file.safetensors on the hub.",
            build, lambda spec: NONE, ranged=True, recalls=lambda value, spec: isinstance(value, str),
        ),
        Control("lora_file", dict | None, "A LoRA, a .safetensors file, used instead.", build_file, lambda spec: None),
        controls.decimal("lora_strength", "LoRA strength", (*LIMITS, 1.0), "How strongly it counts", step=0.05),
    )  # fmt: skip


def wanted(values: Mapping[str, Any], spec: ModelSpec) -> dict[str, float]:
    """The LoRA of a request, by file or hub name. Raises RequestError for what is neither."""
    if "lora" not in values:
        return {}
    strength = controls.check_number("lora_strength", values.get("lora_strength", 1.0), LIMITS)
    file, name = values.get("lora_file"), str(values["lora"]).strip()
    if file:
        return {_uploaded(file): strength}
    if name in ("", NONE):
        return {}
    preset = _preset(name, spec)
    if preset is None and (not _HUB.fullmatch(name) or Path(name).exists()):
        known = ", ".join(each.title for each in PRESETS if spec.name in each.models)
        raise RequestError(
            "lora",
            f"lora: expected {f'one of {known}, or ' if known else ''}a hub name like owner/repository/file.safetensors"
            f", got {name!r:.80}",
        )
    return {preset.place if preset else name: strength}


def worded(values: Mapping[str, Any], spec: ModelSpec, prompt: str) -> str:
    """The prompt with the words that the chosen LoRA was trained with."""
    preset = _preset(str(values.get("lora", "")), spec)
    if preset is None or values.get("lora_file") or not prompt.strip():
        return prompt
    return preset.template.replace(_MARK, prompt)


def _preset(name: str, spec: ModelSpec) -> Preset | None:
    return next((each for each in PRESETS if each.title == name and spec.name in each.models), None)


def _uploaded(value: Any) -> str:
    from apps.common.uploads import is_upload

    path = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(path, str) or not is_upload(Path(path)) or not path.endswith(".safetensors"):
        raise RequestError("lora_file", f"lora_file: expected an uploaded .safetensors file, got {value!r:.80}")
    return path
