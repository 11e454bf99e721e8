"""Score painted pictures: each alone, against its prompt, or against the same picture in the reference precision.

| metric | of | what it needs |
|---|---|---|
| psnr, ssim | a pair | nothing |
| lpips | a pair | torchmetrics, torchvision |
| clip | a picture and its prompt | transformers; the CLIP model is fetched at the first use |
| image-reward | a picture and its prompt | image-reward, in an environment of its own (it needs transformers below 5) |
| fid | a whole set against real pictures | clean-fid, torchvision |
| probe | a picture and the scene its caption names | the zoo's probe |

Scores of pictures are kept in a file a metric and taken again as long as the picture is the same.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from bench.evaluation.machine import write_json
from bench.evaluation.painting import picture_path
from bench.evaluation.sets import Item, PromptSet
from engine.errors import ArgumentError, BackendError
from engine.metrics import load_lpips, psnr, ssim

__all__ = ["METRICS", "Column", "Settings", "prepare", "score"]

METRICS = ("psnr", "ssim", "lpips", "clip", "image-reward", "fid", "probe")
_PAIRS = ("psnr", "ssim", "lpips")
_SAVE_EVERY = 100

Scorer = Callable[[Item, Path], float]


@dataclass(frozen=True)
class Settings:
    """Where and with which models to score."""

    device: str = "cpu"
    clip: str = "openai/clip-vit-large-patch14"
    image_reward: str = "ImageReward-v1.0"
    probe: Path = Path("zoo/weights/probe")


@dataclass
class Column:
    """One precision on one set: a score a picture and metric, and figures of the whole set."""

    precision: str
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


def prepare(metrics: Sequence[str], sets: Sequence[PromptSet], settings: Settings) -> dict[str, Any]:
    """Load what the metrics need, before hours of painting: models by metric.

    Raises BackendError saying what to install or fetch, ArgumentError where no set of the run has what a metric needs.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise ArgumentError(f"--metrics: expected any of {', '.join(METRICS)}, got {metric!r}")
    if "fid" in metrics and not any(s.references or s.scenes is not None for s in sets):
        raise ArgumentError("--metrics fid: none of these prompt sets has real pictures to compare with")
    if "probe" in metrics and not any(s.captions for s in sets):
        raise ArgumentError("--metrics probe: only the captions of the set `zoo` say what a scene must show")
    loaders = {"lpips": _lpips, "clip": _clip, "image-reward": _image_reward, "fid": _fid, "probe": _probe}
    return {metric: loaders[metric](settings) for metric in metrics if metric in loaders}


def score(
    prompts: PromptSet,
    folders: dict[str, Path],
    metrics: Sequence[str],
    models: dict[str, Any],
    settings: Settings,
    kept: Path,
    tell: Callable[[str], None],
) -> list[Column]:
    """Score the pictures of every precision in `folders`, the reference first; scores are kept in `kept`."""
    reference, columns = next(iter(folders.values())), []
    for precision, folder in folders.items():
        column = Column(precision)
        for metric in metrics:
            if metric in _PAIRS and folder == reference:
                continue
            tell(f"{prompts.name} {precision} {metric}")
            if metric == "fid":
                if (kept / "references").is_dir():
                    real = {path.stem: path for path in (kept / "references").iterdir()}
                    pairs = [(picture_path(folder, item), real[item.name]) for item in prompts.items]
                    column.figures["fid"] = models["fid"](*zip(*pairs, strict=True))
            elif metric == "probe":
                if prompts.captions:
                    column.figures |= models["probe"](folder, prompts)
            else:
                scorer = _scorer(metric, models, reference)
                other = reference if metric in _PAIRS else None
                path = kept / "scores" / f"{precision}.{metric}.json"
                judge = {"clip": settings.clip, "image-reward": settings.image_reward}.get(metric, "")
                column.scores[metric] = _each(prompts.items, folder, other, scorer, judge, path)
        columns.append(column)
    return columns


def _scorer(metric: str, models: dict[str, Any], reference: Path) -> Scorer:
    if metric not in _PAIRS:
        return models[metric]
    distance = {"psnr": psnr, "ssim": ssim, **models}[metric]

    def pair(item: Item, path: Path) -> float:
        with Image.open(picture_path(reference, item)) as exact, Image.open(path) as close:
            return distance(exact, close)

    return pair


def _each(
    items: Sequence[Item], folder: Path, other: Path | None, scorer: Scorer, judge: str, path: Path
) -> dict[str, float]:
    """The score of every picture; those of pictures, prompts and judges that did not change come from the file."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, list[Any]] = {}
    for item in items:
        files = [picture_path(place, item) for place in (folder, other) if place is not None]
        missing = next((file for file in files if not file.is_file()), None)
        if missing:
            raise ArgumentError(f"--out: {missing} is missing: run without --only score until all are painted")
        states = [f"{file.stat().st_mtime_ns}.{file.stat().st_size}" for file in files]
        mark = " ".join([*states, judge, item.prompt] if judge else states)
        if known.get(item.name, [None])[0] == mark:
            found[item.name] = known[item.name]
            continue
        value = scorer(item, files[0])
        found[item.name] = [mark, None if math.isinf(value) else value]
        if len(found) % _SAVE_EVERY == 0:
            write_json(path, {**known, **found})
    if found != known:
        write_json(path, found)
    return {name: math.inf if value is None else value for name, (_, value) in found.items()}


def _lpips(settings: Settings) -> Any:
    return load_lpips(settings.device)


def _clip(settings: Settings) -> Scorer:
    """100 times the cosine between picture and prompt, no less than 0 (CLIPScore)."""
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    try:
        model: Any = CLIPModel.from_pretrained(settings.clip, use_safetensors=True)
        pictures, words = (kind.from_pretrained(settings.clip) for kind in (AutoImageProcessor, AutoTokenizer))
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise BackendError(f"--clip: {settings.clip} is neither a folder nor can it be fetched: {first}") from error
    model = model.to(settings.device).eval()
    longest = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def clip(item: Item, path: Path) -> float:
        with Image.open(path) as image:
            pixels = pictures(images=image.convert("RGB"), return_tensors="pt")
        text = words([item.prompt], return_tensors="pt", truncation=True, max_length=longest)
        out = model(**{k: v.to(settings.device) for k, v in {**pixels, **text}.items()})
        return max(0.0, 100 * float(torch.cosine_similarity(out.image_embeds, out.text_embeds)))

    return clip


def _image_reward(settings: Settings) -> Scorer:
    try:
        library = importlib.import_module("ImageReward")
    except ImportError as error:
        raise BackendError(
            f"image-reward cannot be imported ({error}): it needs transformers below 5, so give it an environment of"
            " its own (pip install image-reward) and run there with --only score --metrics image-reward"
        ) from error
    model = library.load(settings.image_reward, device=settings.device)
    return lambda item, path: float(model.score(item.prompt, str(path)))


def _fid(settings: Settings) -> Callable[[Sequence[Path], Sequence[Path]], float]:
    try:
        fid = importlib.import_module("cleanfid.fid")
    except ImportError as error:
        raise BackendError(f"fid needs clean-fid and torchvision: pip install both ({error})") from error
    import torch

    def distance(painted: Sequence[Path], real: Sequence[Path]) -> float:
        # Whole folders are compared, so each gets exactly the pictures of the set, whatever else lies beside them.
        with TemporaryDirectory() as one, TemporaryDirectory() as other:
            for folder, paths in ((one, painted), (other, real)):
                for path in paths:
                    (Path(folder) / path.name).symlink_to(path.resolve())
            where = torch.device(settings.device)
            return float(
                fid.compute_fid(
                    one, other, mode="clean", num_workers=0, device=where, verbose=False, use_dataparallel=False
                )
            )

    return distance


def _probe(settings: Settings) -> Callable[[Path, PromptSet], dict[str, float]]:
    """Share of captions whose objects, details, relations and counts a trained probe finds in the picture."""
    from zoo.probe import Probe
    from zoo.probe.judge import rates, stack

    if not settings.probe.is_dir():
        raise BackendError(f"--probe: {settings.probe} is missing: train one with python -m zoo.probe.train")
    probe = Probe.load(settings.probe, settings.device)

    def judged(folder: Path, prompts: PromptSet) -> dict[str, float]:
        found = []
        for first in range(0, len(prompts.items), 64):
            part = prompts.items[first : first + 64]
            found += probe.detect(stack([Image.open(picture_path(folder, item)).convert("RGB") for item in part]))
        return dict(rates(prompts.captions, found))

    return judged
