"""Score a text-to-picture model on held-out captions: does it paint what they name?

    python -m zoo.evaluate --model tiny --precisions bf16 int4 --probe zoo/weights/probe --out results
    python -m zoo.evaluate --model tiny --precisions bf16 int4@w4a4 int4@w4a8 --device cuda --batch 64 ...
    python -m zoo.evaluate --samples-from results/pictures --precisions bf16 int4 --probe ... --out again

The captions describe sets of objects that no training scene holds. A trained probe looks at each picture; a picture is
right when every named object is there with its colour and shape, each matched with its own detection. All precisions
start from the same noise, so PSNR against the first precision says what the others cost.

Written to --out: results.json (figures, settings, every verdict), RESULTS.md (the table), sheet-PRECISION.png (64
pictures with captions) and with --save-pictures pictures/PRECISION/0000.png and so on. The row "renders" scores true
renders of the captions' scenes: what the probe itself gets wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from zoo import scenes
from zoo.probe import Probe, judge
from zoo.probe.judge import rates, stack
from zoo.scenes.sheet import contact_sheet
from zoo.train.dist import without_cudnn_attention

EVALUATION_SEED = 2026
FIRST_NOISE_SEED = 1000

Generate = Callable[[Sequence[str], Sequence[int], str], torch.Tensor]
"""(prompts, seeds, precision) -> pictures (B, 3, H, W) uint8. What `evaluate` needs of a model."""


@dataclasses.dataclass
class Row:
    """What one precision painted and how it was judged."""

    name: str
    images: torch.Tensor  # (B, 3, H, W) uint8
    seconds: float
    figures: dict[str, float]
    verdicts: list[dict[str, Any]]


def model_spec(model: str) -> Any:
    """The catalogue's row of a name; a folder is taken for another training of `tiny` or `tiny-sana`, as it holds.

    Checkpoints lie beside such a folder, under its name followed by -int4 or -nvfp4.
    """
    from engine.models.catalogue import resolve

    folder = Path(model)
    if not folder.is_dir():
        return resolve(model)
    beside = {kind: folder.with_name(f"{folder.name}-{kind}") for kind in ("int4", "nvfp4")}
    checkpoints = {kind: str(path) for kind, path in beside.items() if path.exists()}
    settings = {"name": folder.name, "title": folder.name, "source": str(folder), "checkpoints": checkpoints}
    return dataclasses.replace(resolve("tiny-sana" if resolve(model).family == "sana" else "tiny"), **settings)


class EngineGenerator:
    """Pictures by an Engine. A precision is `bf16`, `int4` ..., or with its activations `int4@w4a4`.

    `asked` holds the fields of a Request that differ from the model's own settings.
    """

    def __init__(self, model: str, device: str, batch: int | None = None, **asked: Any) -> None:
        self.spec, self.device, self.batch, self.asked = model_spec(model), device, batch, asked
        self.engines: dict[str, Any] = {}

    def engine(self, precision: str) -> Any:
        """The engine of a precision, loaded at its first use; text encoders and VAE are shared."""
        if precision not in self.engines:
            from engine import Engine

            name, _, activation = precision.partition("@")
            share = next(iter(self.engines.values()), None)
            self.engines[precision] = Engine.load(
                self.spec, name, device=self.device, activation=activation or "auto", share=share
            )
        return self.engines[precision]

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], precision: str) -> torch.Tensor:
        from engine import Request

        engine = self.engine(precision)
        requests = [Request(prompt=p, seed=s, **self.asked) for p, s in zip(prompts, seeds, strict=True)]
        if self.batch is None:
            return stack([engine.run(request).image for request in requests])
        return batched(engine, requests)


@torch.inference_mode()
def batched(engine: Any, requests: Sequence[Any]) -> torch.Tensor:
    """Several pictures in one pass of the pipeline, each from its own seed's noise: (B, 3, H, W) uint8.

    `engine` needs `.pipe`, a FluxPipeline or a SANA pipeline, and `.spec`; the requests must agree in all but prompt
    and seed.
    """
    pipe, full = engine.pipe, [request.resolved(engine.spec) for request in requests]
    if engine.spec.family == "sana":
        from zoo.train.sana_samples import paint

        return paint(pipe, [request.prompt for request in full], full[0].width, full[0].steps, full[0].guidance,
                     seeds=[request.seed for request in full])  # fmt: skip
    first = full[0]
    latents = pipe(
        prompt=[r.prompt for r in full],
        height=first.height,
        width=first.width,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        generator=[torch.Generator("cpu").manual_seed(r.seed) for r in full],
        max_sequence_length=engine.spec.max_sequence_length,
        output_type="latent",
    ).images
    latents = pipe._unpack_latents(latents, first.height, first.width, pipe.vae_scale_factor)
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    # Decode as the engine does for one picture, in float from here on: half precision would cost PSNR.
    pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0].float()
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


class FolderGenerator:
    """Ready pictures FOLDER/PRECISION/0000.png ..., numbered in the captions' order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], precision: str) -> torch.Tensor:
        paths = [self.folder / precision / f"{seed - FIRST_NOISE_SEED:04d}.png" for seed in seeds]
        missing = next((path for path in paths if not path.is_file()), None)
        if missing:
            raise SystemExit(f"{missing} is missing: lower --count, or make the pictures with --save-pictures")
        return stack([Image.open(path) for path in paths])


def psnr(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """dB between pictures of two batches, each (B, 3, H, W) uint8; infinite for equal ones."""
    error = ((a.float() - b.float()) ** 2).flatten(1).mean(1).tolist()
    return [math.inf if e == 0 else 10 * math.log10(255**2 / e) for e in error]


def paint(generate: Generate, prompts: Sequence[str], precision: str, batch: int, minutes: float) -> torch.Tensor:
    """Pictures of the prompts, or of as many of them as the time allows (one batch at least)."""
    end, parts = time.monotonic() + 60 * minutes, []
    with tqdm(total=len(prompts), desc=precision, unit="picture") as bar:
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            seeds = range(FIRST_NOISE_SEED + first, FIRST_NOISE_SEED + first + len(some))
            parts.append(generate(some, seeds, precision))
            bar.update(len(some))
            if time.monotonic() > end:
                break
    return torch.cat(parts)


def score(name: str, images: torch.Tensor, captions: Sequence[scenes.Caption], probe: Probe, seconds: float) -> Row:
    """Judge pictures against their captions; also by how many objects a caption names."""
    found = probe.detect(images)
    captions = captions[: len(images)]
    figures: dict[str, float] = dict(rates(captions, found))
    for count in (1, 2, 3):
        pairs = [(c, f) for c, f in zip(captions, found, strict=True) if len(c.objects) == count]
        if pairs:
            figures[f"objects_{count}"] = rates(*zip(*pairs, strict=True))["objects"]
    verdicts = [dataclasses.asdict(judge(c, f)) for c, f in zip(captions, found, strict=True)]
    return Row(name, images, seconds, figures, verdicts)


def compare(rows: Sequence[Row]) -> None:
    """Add each row's PSNR against the first one, over the pictures that both painted."""
    for row in rows[1:]:
        n = min(len(row.images), len(rows[0].images))
        values = [v for v in psnr(rows[0].images[:n], row.images[:n]) if math.isfinite(v)]
        row.figures["psnr_mean"] = float(np.mean(values)) if values else math.inf
        row.figures["psnr_median"] = float(np.median(values)) if values else math.inf
        row.figures["psnr_tenth"] = float(np.quantile(values, 0.1)) if values else math.inf
        row.figures["equal"] = 1 - len(values) / max(1, n)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; rates in percent."""
    lines = [
        "| precision | pictures | objects right | 1 / 2 / 3 objects | with size, material | relations right "
        "| count right | PSNR mean (10 %) dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    percent = lambda row, key: f"{100 * row.figures[key]:.1f}" if key in row.figures else "-"  # noqa: E731
    for row in rows:
        each = " / ".join(percent(row, f"objects_{k}") for k in (1, 2, 3))
        noise = (
            f"{row.figures['psnr_mean']:.2f} ({row.figures['psnr_tenth']:.2f})" if "psnr_mean" in row.figures else "-"
        )
        cells = (
            percent(row, "objects"),
            each,
            percent(row, "strict"),
            percent(row, "relations"),
            percent(row, "counted"),
        )
        lines.append(f"| {row.name} | {len(row.images)} | {' | '.join(cells)} | {noise} |")
    return "\n".join(lines) + "\n"


def write(out: Path, rows: Sequence[Row], captions: Sequence[scenes.Caption], probe: Probe, settings: dict) -> None:
    """results.json, RESULTS.md and a contact sheet a row."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": settings,
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "device": settings["device_name"]},
        "probe": probe.report,
        "rows": {row.name: {**row.figures, "pictures": len(row.images), "seconds": row.seconds} for row in rows},
        "verdicts": {row.name: row.verdicts for row in rows},
        "captions": [c.text for c in captions],
    }
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    held = probe.report.get("held_out", {})
    keys = [key for key in ("recall", "precision", "shape", "color", "relations") if key in held]
    note = ", ".join(f"{key} {100 * held[key]:.1f} %" for key in keys)
    text = f"# {settings['model']}\n\n{len(captions)} held-out captions on {settings['device_name']}. "
    text += f"The probe on held-out renders: {note}.\n\n" if note else "\n\n"
    (out / "RESULTS.md").write_text(text + table(rows))
    for row in rows:
        texts = [c.text for c in captions[: len(row.images)]][:64]
        contact_sheet(row.images[:64], texts).save(out / f"sheet-{row.name}.png")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    without_cudnn_attention()
    probe = Probe.load(options.probe, device)
    batch = scenes.sample(options.count, options.seed, "test")
    captions = scenes.describe(batch, options.seed)
    if options.samples_from:
        generate: Generate = FolderGenerator(options.samples_from)
    else:
        generate = EngineGenerator(options.model, device, options.batch, steps=options.steps, guidance=options.guidance)
    rows = []
    for precision in options.precisions:
        start = time.perf_counter()
        prompts = [c.text for c in captions]
        images = paint(generate, prompts, precision, options.batch or 8, options.minutes / len(options.precisions))
        rows.append(score(precision, images, captions, probe, time.perf_counter() - start))
        if options.save_pictures:
            _save(options.out / "pictures" / precision, images)
    compare(rows)
    if not options.no_reference:
        rows.append(_reference(batch, captions, probe, device))
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    settings["device_name"] = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    write(options.out, rows, captions, probe, settings)
    print(table(rows))
    print(f"wrote {options.out}")


def _reference(batch: scenes.Scenes, captions: Sequence[scenes.Caption], probe: Probe, device: str) -> Row:
    start, parts = time.perf_counter(), []
    with tqdm(total=len(batch), desc="renders", unit="picture") as bar:
        for part in scenes.stream(batch, device=device):
            parts.append(part.image.cpu())
            bar.update(len(part.image))
    return score("renders", torch.cat(parts), captions, probe, time.perf_counter() - start)


def _save(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="tiny", help="catalogue name, or a folder with another training of tiny")
    add("--precisions", nargs="+", default=["bf16", "int4"], metavar="P",
        help="the first is the one that others are compared with (default bf16 int4)")  # fmt: skip
    add("--count", type=int, default=512, help="held-out captions (default 512)")
    add("--device", default="auto", help="auto, cpu or cuda[:N] (default auto)")
    add(
        "--batch",
        type=int,
        help="pictures in one pass of the pipeline; without it each is a run of its own, as a user's",
    )
    add("--steps", type=int, help="denoising steps (default the model's)")
    add("--guidance", type=float, help="guidance scale (default the model's)")
    add("--minutes", type=float, default=60.0, help="time for painting, shared by the precisions; fewer pictures are "
        "scored when it ends (default 60)")  # fmt: skip
    add("--seed", type=int, default=EVALUATION_SEED, help=f"seed of scenes and captions (default {EVALUATION_SEED})")
    add("--probe", type=Path, required=True, help="folder of a trained probe (python -m zoo.probe.train)")
    add("--samples-from", type=Path, metavar="DIR", help="score ready pictures DIR/PRECISION/0000.png ... instead")
    add("--save-pictures", action="store_true", help="keep every picture below OUT/pictures")
    add("--no-reference", action="store_true", help="leave out the row that scores true renders")
    add("--out", type=Path, required=True, help="folder for the results")
    return parser


if __name__ == "__main__":
    main()
