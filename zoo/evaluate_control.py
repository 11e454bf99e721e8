"""Score the Canny, Depth and Fill models on held-out cases: do they keep to what they are given?

    python -m zoo.evaluate_control --kind canny --base zoo/weights/flux-tiny --lora zoo/weights/canny-tiny --out results
    python -m zoo.evaluate_control --kind fill --model runs/fill-whole --precisions bf16 int4@w4a4 int4@w4a8 ...

BF16 runs through the ordinary diffusers pipeline: a base with a LoRA file, or `--model`, a folder of its own. Other
precisions run through the engine and need `--model` (a folder with its 4-bit checkpoint beside it, or a catalogue
name). Every precision starts from the same noise; PSNR is against the first one. The row "renders" scores true
renders, the row "autoencoder" the same after encoding and decoding: what no model of this base can beat.

Needed besides: --depth (the depth estimator's folder) for depth, --probe for fill; with --probe the others are judged
on objects too. Written to --out: results.json, RESULTS.md, sheet-PRECISION.jpg, and with --save-pictures the pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zoo import control_cases
from zoo.control_cases import Cases
from zoo.scenes.sheet import contact_sheet
from zoo.train.dist import without_cudnn_attention

PIPELINES = {"canny": "FluxControlPipeline", "depth": "FluxControlPipeline", "fill": "FluxFillPipeline"}
MAIN = {"canny": "edge_f1", "depth": "rank_correlation", "fill": "appears"}
FIRST_NOISE_SEED = 1000


@dataclasses.dataclass
class Row:
    name: str
    images: torch.Tensor  # (B, 3, S, S) uint8
    seconds: float
    figures: dict[str, float]


def open_pipeline(options: argparse.Namespace, precision: str, device: str) -> Any:
    """A diffusers pipeline of the kind's class, in a precision.

    Raises SystemExit when the options do not say where it is.
    """
    import diffusers

    pipeline_class = getattr(diffusers, PIPELINES[options.kind])
    name, _, activation = precision.partition("@")
    if name != "bf16" or (options.model and not Path(options.model).is_dir()):
        if not options.model:
            raise SystemExit(
                f"{precision} needs --model: a pipeline folder with its 4-bit checkpoint, or a catalogue name"
            )
        from engine import Engine

        pipe = Engine.load(options.model, name, device=device, activation=activation or "auto").pipe
    elif options.model:
        pipe = pipeline_class.from_pretrained(options.model, dtype=torch.bfloat16)
    elif options.base and options.lora:
        from zoo.train import lora

        merged = lora.merge(options.base, options.lora)
        merged = torch.nn.Module.to(merged, torch.bfloat16)
        pipe = pipeline_class.from_pretrained(options.base, transformer=merged, dtype=torch.bfloat16)
    else:
        raise SystemExit("give --model, or --base and --lora")
    pipe.to(device)
    pipe.vae.to(torch.bfloat16)  # the pipeline hands the autoencoder's latents to the transformer as they are
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def paint(pipe: Any, kind: str, cases: Cases, *, steps: int, guidance: float, length: int, batch: int) -> torch.Tensor:
    """The cases painted in batches, each case from its own seed's noise: (B, 3, S, S) uint8."""
    side, out = cases.given.shape[-1], []
    for first in range(0, len(cases), batch):
        rows = slice(first, min(first + batch, len(cases)))
        given = cases.given[rows].float() / 255
        if kind == "fill":
            inputs = {"image": given, "mask_image": cases.hole[rows, None].float()}
        else:
            # A tensor goes to the autoencoder as it is, so in the range that it was trained on.
            inputs = {"control_image": given * 2 - 1}
        latents = pipe(
            prompt=cases.prompts[rows], height=side, width=side, num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(FIRST_NOISE_SEED + i) for i in range(rows.start, rows.stop)],
            max_sequence_length=length, output_type="latent", **inputs,
        ).images  # fmt: skip
        latents = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        out.append(to_bytes(pixels))
    return torch.cat(out)


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to uint8 on the CPU."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


@torch.inference_mode()
def through_autoencoder(vae: Any, pictures: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Pictures encoded and decoded, uint8 (B, 3, S, S)."""
    out = []
    for part in pictures.split(batch):
        x = (part.float() / 127.5 - 1).to(vae.device, vae.dtype)
        out.append(to_bytes(vae.decode(vae.encode(x).latent_dist.mean, return_dict=False)[0]))
    return torch.cat(out)


class Judge:
    """Scores painted pictures of one kind of case."""

    def __init__(self, options: argparse.Namespace, cases: Cases, device: str) -> None:
        self.kind, self.cases, self.probe, self.estimator = options.kind, cases, None, None
        if options.probe:
            from zoo.probe import Probe

            self.probe = Probe.load(options.probe, device)
        if self.kind == "depth":
            if not options.depth:
                raise SystemExit("--kind depth needs --depth: the folder of a depth estimator")
            self.estimator = control_cases.DepthEstimator(options.depth, device)
        if self.kind == "fill" and self.probe is None:
            raise SystemExit("--kind fill needs --probe: the folder of a trained probe")

    def __call__(self, painted: torch.Tensor) -> dict[str, float]:
        if self.kind == "fill":
            return control_cases.score_fill(self.cases, painted, self.probe)
        figures = (
            control_cases.score_canny(self.cases, painted) if self.kind == "canny"
            else control_cases.score_depth(self.cases, painted, self.estimator)
        )  # fmt: skip
        return figures | (control_cases.score_objects(self.cases, painted, self.probe) if self.probe else {})


def add_psnr(rows: list[Row]) -> None:
    """Mean PSNR in dB of each row against the first, which needs none."""
    for row in rows[1:]:
        error = (row.images.float() - rows[0].images.float()).square().flatten(1).mean(1)
        row.figures["psnr"] = float((10 * torch.log10(255**2 / error.clamp(min=1e-2))).mean())


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    lines = ["| | " + " | ".join([*names, "s"]) + " |", "|---" * (len(names) + 2) + "|"]
    cell = lambda row, name: f"{row.figures[name]:.3f}" if name in row.figures else "-"  # noqa: E731
    lines += [
        f"| {row.name} | " + " | ".join([*(cell(row, n) for n in names), f"{row.seconds:.1f}"]) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def write(options: argparse.Namespace, rows: list[Row], cases: Cases, device: str) -> None:
    """results.json, RESULTS.md and the contact sheets."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    record = {
        "kind": options.kind, "main": MAIN[options.kind], "settings": settings, "cases": len(cases),
        "machine": {"python": platform.python_version(), "torch": torch.__version__, "device": where},
        "rows": {row.name: {**row.figures, "seconds": round(row.seconds, 2)} for row in rows},
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    title = f"# {options.kind}\n\n{len(cases)} held-out cases on {where}, "
    title += f"{options.steps} steps, guidance {options.guidance}.\n\n"
    (out / "RESULTS.md").write_text(title + table(rows))
    for row in rows:
        pictures, texts = control_cases.tiles(cases, row.images, options.sheet)
        contact_sheet(pictures, texts, columns=6, cell=192).save(out / f"sheet-{row.name}.jpg", quality=88)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.evaluate_control", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kind", choices=sorted(PIPELINES), required=True)
    add("--base", type=Path, help="FLUX pipeline folder that --lora belongs to")
    add("--lora", type=Path, help="folder with pytorch_lora_weights.safetensors")
    add("--model", help="a pipeline folder of its own, or a catalogue name")
    add("--precisions", nargs="+", default=["bf16"], metavar="P", help="bf16, int4, int4@w4a4 ... (default bf16)")
    add("--probe", type=Path)
    add("--depth", type=Path, help="folder of the depth estimator")
    add("--out", type=Path, required=True)
    add("--count", type=int, default=256)
    add("--batch", type=int, default=32)
    add("--steps", type=int, default=12)
    add("--guidance", type=float, default=3.0)
    add("--length", type=int, default=64, help="text tokens (default 64)")
    add("--size", type=int, default=256)
    add("--sheet", type=int, default=32, help="cases on a contact sheet (default 32)")
    add("--device", default="auto")
    add("--save-pictures", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    without_cudnn_attention()
    if options.kind == "fill":
        cases = control_cases.fill(options.count, options.size, device)
    else:
        cases = control_cases.control(options.kind, options.count, options.size, device)
    judge, rows, vae = Judge(options, cases, device), [], None
    for precision in options.precisions:
        pipe = open_pipeline(options, precision, device)
        began = time.perf_counter()
        images = paint(pipe, options.kind, cases, steps=options.steps, guidance=options.guidance, length=options.length,
                       batch=options.batch)  # fmt: skip
        rows.append(Row(precision, images, time.perf_counter() - began, judge(images)))
        print(f"{precision}: {rows[-1].figures}", flush=True)
        if options.save_pictures:
            _save(options.out / "pictures" / precision, images)
        vae = vae or pipe.vae
        del pipe
    add_psnr(rows)
    for name, images in (("autoencoder", through_autoencoder(vae, cases.truth)), ("renders", cases.truth)):
        rows.append(Row(name, images, 0.0, judge(images)))
    write(options, rows, cases, device)
    print(table(rows))


def _save(folder: Path, images: torch.Tensor) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")


if __name__ == "__main__":
    main()
