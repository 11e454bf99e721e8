"""The table of models this engine knows by name.

A row is data only: where the 16-bit model lives, where its 4-bit checkpoints live, and the defaults and limits
a page or a command needs. Nothing outside this table may depend on which row is in use, so the small model that
ships in the repository takes the same path as the large ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine.errors import ModelError
from engine.models.families import FAMILIES, family_of_pipeline, is_transformer

__all__ = ["CATALOGUE", "ModelSpec", "Range", "names", "resolve", "zoo_folder"]

_LORA = "pytorch_lora_weights.safetensors"
# 4-bit precisions, and what published files call them.
_PUBLISHED = {"int4": "int4", "nvfp4": "fp4"}


@dataclass(frozen=True)
class Range:
    """A numeric setting: its default, its inclusive limits and its step."""

    default: float
    low: float
    high: float
    step: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """One model: where it is, how large, and the settings that suit it.

    `family` is a name of engine.models.families, or a transformer class of diffusers that has none (then the model
    runs by its pipeline's own call). `source` is a diffusers folder or a hub id; `checkpoints` maps a 4-bit precision
    to a folder, a `.safetensors` file or `owner/repo/file.safetensors` on the hub. `lora` is a LoRA file that turns the
    source's transformer into this model's, in every precision (as FLUX.1-Canny-dev-lora does); empty where the source
    is the model itself.
    `text_encoder` is a 4-bit T5 (a file, or `owner/repo/file.safetensors`) to use instead of the source's own.
    `prior` is the pipeline that puts pictures into the transformer's words (FLUX.1 Redux), `runner` the way pictures
    are made where it is not the family's own (engine.models.families). A model that starts from a picture can do
    without a prompt: `prompt_needed`. `size` holds pixels (width and height alike).
    """

    name: str
    title: str
    family: str
    pipeline: str
    source: str
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    steps: Range = Range(28, 1, 50)
    guidance: Range | None = Range(3.5, 1.0, 10.0, 0.1)
    size: Range = Range(1024, 256, 2048, 16)
    max_sequence_length: int = 512
    lora: str = ""
    text_encoder: str = ""
    prior: str = ""
    runner: str = ""
    prompt_needed: bool = True
    licence: str = ""
    gated: bool = False
    download_gib: float = 0.0

    @property
    def local(self) -> bool:
        """Whether the 16-bit weights lie in a folder on this machine."""
        return Path(self.source).is_dir()

    @property
    def ships(self) -> bool:
        """Whether the model comes with the project."""
        return Path(self.source).is_relative_to(zoo_folder())

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions this model can run in, BF16 first."""
        return ("bf16", *self.checkpoints)

    @property
    def usual(self) -> tuple[str, ...]:
        """Those it runs in unless others are asked for: NVFP4 only where there is no INT4."""
        return tuple(name for name in self.precisions if name != "nvfp4" or "int4" not in self.checkpoints)

    def makes(self, precision: str) -> bool:
        """Whether that checkpoint does not ship, and is made of the 16-bit weights instead (engine.quantize.made)."""
        return self.ships and precision == "nvfp4" and not Path(self.checkpoints[precision]).exists()


def zoo_folder() -> Path:
    """Folder of the small models that ship with the project; ENGINE_ZOO overrides it."""
    override = os.environ.get("ENGINE_ZOO")
    return Path(override) if override else Path(__file__).resolve().parents[2] / "zoo" / "weights"


def _beside(folder: Path) -> dict[str, str]:
    """Where the 4-bit checkpoints of a folder belong."""
    return {precision: str(folder.with_name(f"{folder.name}-{precision}")) for precision in _PUBLISHED}


def _flux(name: str, title: str, repository: str, **overrides: object) -> ModelSpec:
    settings: dict[str, object] = {
        "source": f"black-forest-labs/{repository}",
        "checkpoints": {
            precision: f"nunchaku-tech/nunchaku-{name}/svdq-{kind}_r32-{name}.safetensors"
            for precision, kind in _PUBLISHED.items()
        },
        "pipeline": "FluxPipeline",
        "licence": "FLUX.1 [dev] Non-Commercial License",
        "gated": True,
        "download_gib": 31.4,
    }
    return ModelSpec(name=name, title=title, family="flux", **(settings | overrides))  # pyright: ignore[reportArgumentType]


def _tool(word: str, pipeline: str, guidance: Range) -> ModelSpec:
    """One of the FLUX.1 tools: a FLUX.1 [dev] that reads a picture besides the prompt."""
    name = f"flux.1-{word.lower()}-dev"
    return _flux(name, f"FLUX.1 {word} [dev]", f"FLUX.1-{word}-dev", pipeline=pipeline, guidance=guidance)


def _tiny() -> ModelSpec:
    zoo = zoo_folder()
    return ModelSpec(
        name="tiny",
        title="Tiny FLUX",
        family="flux",
        pipeline="FluxPipeline",
        source=str(zoo / "flux-tiny"),
        checkpoints=_beside(zoo / "flux-tiny"),
        steps=Range(12, 1, 50),
        guidance=Range(4.5, 1.0, 6.0, 0.1),
        size=Range(256, 128, 512, 16),
        max_sequence_length=64,
        licence="Apache-2.0",
    )


def _tuned(name: str, title: str, pipeline: str, guidance: Range) -> ModelSpec:
    """The small FLUX with a LoRA that makes it read a control map, or a picture with a hole."""
    lora = zoo_folder() / f"{name.removeprefix('tiny-')}-tiny" / _LORA
    return replace(_tiny(), name=name, title=title, pipeline=pipeline, lora=str(lora), guidance=guidance)


def _redux(base: ModelSpec, name: str, title: str, prior: str, guidance: Range, lora: str = "") -> ModelSpec:
    """A FLUX that is told what to paint by pictures; a small one needs a LoRA to understand them."""
    return replace(
        base, name=name, title=title, prior=prior, lora=lora, runner="redux", prompt_needed=False, guidance=guidance
    )


def _sketch(base: ModelSpec, name: str, title: str, lora: str) -> ModelSpec:
    """A FLUX that paints line drawings in one step, by a pix2pix-turbo LoRA."""
    once = Range(1, 1, 1)
    return replace(
        base, name=name, title=title, lora=lora, runner="sketch", prompt_needed=False, steps=once, guidance=None
    )


def _tiny_sana() -> ModelSpec:
    zoo = zoo_folder()
    return ModelSpec(
        name="tiny-sana",
        title="Tiny SANA",
        family="sana",
        pipeline="SanaPAGPipeline",
        source=str(zoo / "sana-tiny"),
        checkpoints=_beside(zoo / "sana-tiny"),
        steps=Range(20, 1, 50),
        guidance=Range(4.5, 1.0, 10.0, 0.1),
        size=Range(256, 256, 512, 32),
        max_sequence_length=64,
        licence="Apache-2.0",
    )


def _sana() -> ModelSpec:
    return ModelSpec(
        name="sana-1.6b",
        title="SANA 1.6B",
        family="sana",
        pipeline="SanaPAGPipeline",
        source="Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        checkpoints={"int4": "nunchaku-tech/nunchaku-sana/svdq-int4_r32-sana1.6b.safetensors"},
        steps=Range(20, 1, 50),
        guidance=Range(5.0, 1.0, 10.0, 0.1),
        size=Range(1024, 256, 4096, 32),
        max_sequence_length=300,
        licence="NVIDIA License (NSCL v2-custom); text encoder: Gemma Terms of Use",
        download_gib=9.0,
    )


def _rows() -> tuple[ModelSpec, ...]:
    schnell = _flux(
        "flux.1-schnell",
        "FLUX.1 [schnell]",
        "FLUX.1-schnell",
        steps=Range(4, 1, 8),
        guidance=None,
        max_sequence_length=256,
        licence="Apache-2.0",
    )
    dev, tiny, zoo = _flux("flux.1-dev", "FLUX.1 [dev]", "FLUX.1-dev"), _tiny(), zoo_folder()
    tiny_sketch, tiny_prior = str(zoo / "sketch-tiny" / _LORA), zoo / "redux-tiny"
    large_sketch = "mit-han-lab/svdq-flux.1-schnell-pix2pix-turbo/sketch.safetensors"
    large_prior = "black-forest-labs/FLUX.1-Redux-dev"
    return (
        tiny,
        _tuned("tiny-canny", "Tiny FLUX Canny", "FluxControlPipeline", Range(3.0, 1.0, 6.0, 0.1)),
        _tuned("tiny-depth", "Tiny FLUX Depth", "FluxControlPipeline", Range(3.0, 1.0, 6.0, 0.1)),
        _tuned("tiny-fill", "Tiny FLUX Fill", "FluxFillPipeline", Range(3.0, 1.0, 6.0, 0.1)),
        _redux(
            tiny, "tiny-redux", "Tiny FLUX Redux", str(tiny_prior), Range(2.0, 1.0, 6.0, 0.1), str(tiny_prior / _LORA)
        ),
        _sketch(tiny, "tiny-sketch", "Tiny FLUX Sketch", tiny_sketch),
        _tiny_sana(),
        schnell,
        dev,
        _redux(dev, "flux.1-redux-dev", "FLUX.1 Redux [dev]", large_prior, Range(2.5, 1.0, 10.0, 0.1)),
        _sketch(schnell, "flux.1-schnell-sketch", "FLUX.1 [schnell] Sketch", large_sketch),
        _tool("Fill", "FluxFillPipeline", Range(30.0, 1.0, 50.0, 0.1)),
        _tool("Depth", "FluxControlPipeline", Range(10.0, 1.0, 30.0, 0.1)),
        _tool("Canny", "FluxControlPipeline", Range(30.0, 1.0, 50.0, 0.1)),
        _sana(),
    )


CATALOGUE: Mapping[str, ModelSpec] = {spec.name: spec for spec in _rows()}
ALIASES: Mapping[str, str] = {
    "schnell": "flux.1-schnell",
    "dev": "flux.1-dev",
    "fill": "flux.1-fill-dev",
    "depth": "flux.1-depth-dev",
    "canny": "flux.1-canny-dev",
    "redux": "flux.1-redux-dev",
    "sketch": "flux.1-schnell-sketch",
    "sana": "sana-1.6b",
}


def names() -> tuple[str, ...]:
    """Names and aliases that `resolve` takes besides folders and hub ids."""
    return (*CATALOGUE, *ALIASES)


def resolve(model: str | ModelSpec) -> ModelSpec:
    """Return the row for a name, an alias, a diffusers folder or a hub id.

    Raises ModelError when `model` is none of these.
    """
    if isinstance(model, ModelSpec):
        return model
    name = ALIASES.get(model, model)
    if name in CATALOGUE:
        return CATALOGUE[name]
    if Path(model).is_dir():
        return _from_folder(Path(model))
    if model.count("/") == 1 and not model.startswith((".", "/")):
        if "sana" in model.lower():
            return _other("sana", model, model, "SanaPAGPipeline", {})
        return _other("flux", model, model, "FluxPipeline", {})
    raise ModelError(
        f"model: expected one of {', '.join(names())}, a diffusers folder or a hub id (owner/name), got {model!r}"
    )


def _from_folder(folder: Path) -> ModelSpec:
    """Read a diffusers folder's own index; 4-bit checkpoints beside it are found by -int4 and -nvfp4."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"model: {folder} holds no model_index.json, so it is not a diffusers pipeline folder")
    rows = (row for row in CATALOGUE.values() if not row.lora and not row.prior)
    known = next((row for row in rows if Path(row.source) == folder.resolve()), None)
    if known is not None:
        return known
    pipeline = json.loads(index.read_text()).get("_class_name", "")
    row = family_of_pipeline(pipeline)
    checkpoints = {precision: place for precision, place in _beside(folder).items() if Path(place).exists()}
    if row is None and is_transformer(named := _transformer_class(folder)):
        return _other(named, folder.name, str(folder), pipeline, checkpoints)
    if row is None:
        kinds = " or ".join(family.pipelines for family in FAMILIES.values())
        raise ModelError(
            f"model: {folder} holds a {pipeline or 'nameless pipeline'}; expected a {kinds} pipeline, or one"
            " with a transformer of diffusers"
        )
    parent = _same_transformer(folder, pipeline)
    if parent is not None:
        return replace(parent, name=folder.name, title=folder.name, source=str(folder), checkpoints=checkpoints)
    return _other(row.name, folder.name, str(folder), pipeline, checkpoints)


def _same_transformer(folder: Path, pipeline: str) -> ModelSpec | None:
    """The small model that `folder` is another training of: it wants that one's sizes, steps and text length."""
    for row in CATALOGUE.values():
        plain = not (row.lora or row.prior or row.runner)
        if plain and row.ships and row.pipeline == pipeline and _config(Path(row.source)) == _config(folder) != {}:
            return row
    return None


def _config(folder: Path) -> dict[str, object]:
    """What a pipeline folder says of its transformer's shape; nothing where it says nothing."""
    return {key: value for key, value in _transformer(folder).items() if not key.startswith("_")}


def _transformer_class(folder: Path) -> str:
    return str(_transformer(folder).get("_class_name", ""))


def _transformer(folder: Path) -> dict[str, object]:
    try:
        return dict(json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _other(family: str, name: str, source: str, pipeline: str, checkpoints: Mapping[str, str]) -> ModelSpec:
    """A row for a model that the table does not have, with the limits of its family."""
    row = ModelSpec(name, name, family, pipeline, source, checkpoints)
    if family != "sana":
        return row
    known = CATALOGUE["sana-1.6b"]
    return replace(row, steps=known.steps, guidance=known.guidance, size=known.size, max_sequence_length=300)
