"""Score the models that start from a picture: Redux variations and mixes, and sketches painted in one step.

    python -m zoo.evaluate_image redux --redux zoo/weights/redux-tiny --probe zoo/weights/probe --out DIR
    python -m zoo.evaluate_image sketch --lora zoo/weights/sketch-tiny --outline zoo/weights/outline-tiny \
        --probe zoo/weights/probe --precisions bf16 int4@w4a4 int4@w4a8 --out DIR

Models are loaded, and LoRAs put on them, as the pages do it: that of --lora, and that in the folder of --redux where
there is one. Held-out scenes with fixed seeds; all precisions start from the same noise. Written to --out: results.json
(figures and settings), a table on the terminal and in RESULTS.md, and a contact sheet a precision.

Redux figures: objects (all objects of the source are in the variation, with colour and shape), each (share of objects),
copy_psnr (dB against the source: high would mean a copy), and for mixes half and half of two pictures: colors_both (a
colour that only one source has is there, for each of the two), objects_both (a whole object of each), all (every
object of both), beside the same figures for other pairs' mixes (chance).
Sketch figures at each alpha: outline_iou (lines of the painted objects against the sketch's, 2 pixels apart at most),
canny_recall (share of the sketch's lines that lie on a Canny edge), colors and objects (all that the prompt names).
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.models.catalogue import ModelSpec, resolve
from zoo import scenes
from zoo.evaluate import EVALUATION_SEED, FIRST_NOISE_SEED, psnr
from zoo.probe import Detection, Probe
from zoo.probe.judge import agrees, rates
from zoo.scenes import Caption, Named
from zoo.scenes.sheet import contact_sheet
from zoo.train import outliner, redux_paint, strokes
from zoo.train.dist import without_cudnn_attention
from zoo.train.edges import canny
from zoo.train.lora import WEIGHTS

Figures = dict[str, float]
ALPHAS = (0.28, 0.4, 0.5)


@dataclasses.dataclass
class Bench:
    """What every part of an evaluation needs."""

    options: argparse.Namespace
    device: str
    probe: Probe
    engines: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def spec(self) -> ModelSpec:
        """The base with the LoRA that is to be scored; Redux of a large model needs none."""
        options = self.options
        path = (options.redux if options.kind == "redux" else options.lora) / WEIGHTS
        spec = resolve(options.model)
        if options.kind == "redux" and not path.is_file():
            return spec
        return dataclasses.replace(spec, lora=str(path.resolve()))

    def engine(self, precision: str) -> Any:
        """The engine of `bf16`, `int4`, `int4@w4a4` ...; text encoders and VAE are shared."""
        from engine import Engine

        if precision not in self.engines:
            name, _, activation = precision.partition("@")
            share = next(iter(self.engines.values()), None)
            self.engines[precision] = Engine.load(
                self.spec, name, device=self.device, activation=activation or "auto", share=share
            )
            self.engines[precision].pipe.set_progress_bar_config(disable=True)
        return self.engines[precision]

    def parts(self, n: int) -> Iterator[slice]:
        return (slice(first, min(n, first + self.options.batch)) for first in range(0, n, self.options.batch))


def captions_of(batch: scenes.Scenes) -> list[Caption]:
    """Captions without words that name every object in full: what a perfect variation shows."""
    rows = zip(
        batch.count.tolist(), *(getattr(batch, n).tolist() for n in ("shape", "color", "size", "material")), strict=True
    )
    return [Caption("", tuple(_named(k, shape, color, size, material) for k in range(n)))
            for n, shape, color, size, material in rows]  # fmt: skip


def _named(k: int, shape: list, color: list, size: list, material: list) -> Named:
    lexicon = scenes.SHAPES, scenes.COLORS, scenes.SIZES, scenes.MATERIALS
    return Named(k, *(words[value[k]] for words, value in zip(lexicon, (shape, color, size, material), strict=True)))


def share(values: Sequence[bool | float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)


def each_object(captions: Sequence[Caption], found: Sequence[Sequence[Detection]]) -> float:
    """Share of named objects of which a detection has colour and shape."""
    return share(
        [
            any(agrees(n, d, strict=False) for d in seen)
            for c, seen in zip(captions, found, strict=True)
            for n in c.objects
        ]
    )


def all_colors(caption: Caption, found: Sequence[Detection]) -> bool:
    """Whether every named colour is seen as often as it is named."""
    wanted = collections.Counter(n.color for n in caption.objects if n.color)
    return not wanted - collections.Counter(d.color for d in found)


def both_shown(a: Caption, b: Caption, found: Sequence[Detection]) -> dict[str, bool]:
    """What a mix of the pictures of `a` and `b` holds of the two; their colours differ."""
    colors = [any(d.color in {n.color for n in c.objects} for d in found) for c in (a, b)]
    objects = [any(agrees(n, d, strict=False) for n in c.objects for d in found) for c in (a, b)]
    every = all(any(agrees(n, d, strict=False) for d in found) for c in (a, b) for n in c.objects)
    return {"colors_both": all(colors), "objects_both": all(objects), "all": every}


def choose_pairs(batch: scenes.Scenes, captions: Sequence[Caption], most: int = 3) -> list[tuple[int, int]]:
    """Pairs of scenes with at most `most` objects together and no colour in common; each scene is used once."""
    colors = [{n.color for n in c.objects} for c in captions]
    left, pairs = list(range(len(batch))), []
    while left:
        a = left.pop(0)
        fits = (
            b for b in left if len(captions[a].objects) + len(captions[b].objects) <= most and not colors[a] & colors[b]
        )
        b = next(fits, None)
        if b is not None:
            left.remove(b)
            pairs.append((a, b))
    return pairs


def rendered(batch: scenes.Scenes, size: int, device: str) -> torch.Tensor:
    return torch.cat([part.image.cpu() for part in scenes.stream(batch, size, device)])


def evaluate_redux(bench: Bench) -> tuple[dict[str, Figures], dict[str, torch.Tensor]]:
    """Figures and sheet pictures of every precision."""
    from diffusers import FluxPriorReduxPipeline

    options, device = bench.options, bench.device
    prior = FluxPriorReduxPipeline.from_pretrained(options.redux, dtype=torch.bfloat16).to(device)
    batch = scenes.sample(options.count, options.seed, "test")
    more = scenes.sample(4 * options.count, options.seed + 1, "test")
    captions, others = captions_of(batch), captions_of(more)
    pairs = choose_pairs(more, others)[: options.count]
    source = rendered(batch, options.size, device)
    used = torch.tensor([i for pair in pairs for i in pair])
    halves = redux_paint.pil(rendered(more[used], options.size, device))
    length = options.text_length or None
    said = redux_paint.embed(prior, [[p] for p in redux_paint.pil(source)], [[1.0]] * len(source), length)
    groups = [halves[2 * i : 2 * i + 2] for i in range(len(pairs))]
    mixed_said = redux_paint.embed(prior, groups, [[0.5, 0.5]] * len(groups), length)
    figures, sheets, first = {}, {}, None
    for precision in options.precisions:
        pipe, began = bench.engine(precision).pipe, time.perf_counter()
        kind = {"steps": options.steps, "guidance": options.guidance, "size": options.size, "batch": options.batch}
        painted = redux_paint.paint(pipe, *said, seed=FIRST_NOISE_SEED, **kind)
        mixed = redux_paint.paint(pipe, *mixed_said, seed=FIRST_NOISE_SEED + 1, **kind)
        row = redux_figures(bench.probe, captions, source, painted, [(others[a], others[b]) for a, b in pairs], mixed)
        first = painted if first is None else first
        row |= {"psnr": _mean_psnr(first, painted), "seconds": round(time.perf_counter() - began, 2)}
        figures[precision] = row
        n = min(32, len(mixed))
        stacked = torch.stack([_tensor(halves[0 : 2 * n : 2]), _tensor(halves[1 : 2 * n : 2]), mixed[:n]], 1).flatten(
            0, 1
        )
        sheets[f"variations-{precision}"] = torch.stack([source[:32], painted[:32]], 1).flatten(0, 1)
        sheets[f"mixes-{precision}"] = stacked
    figures["renders"] = {"objects": rates(captions, bench.probe.detect(source))["objects"]}
    return figures, sheets


def redux_figures(probe: Probe, captions: Sequence[Caption], source: torch.Tensor, painted: torch.Tensor,
                  pairs: Sequence[tuple[Caption, Caption]], mixed: torch.Tensor) -> Figures:  # fmt: skip
    """Figures of variations of `source` and of mixes of `pairs`."""
    found, in_mixes = probe.detect(painted), probe.detect(mixed)
    row = {name: rates(captions, found)[name] for name in ("objects", "strict", "counted")}
    row |= {"each": each_object(captions, found), "copy_psnr": _mean_psnr(source, painted)}
    shown = [both_shown(a, b, seen) for (a, b), seen in zip(pairs, in_mixes, strict=True)]
    strangers = [both_shown(a, b, seen) for (a, b), seen in zip(pairs, in_mixes[1:] + in_mixes[:1], strict=True)]
    for name in shown[0] if shown else ():
        row[f"mix_{name}"], row[f"chance_{name}"] = share([s[name] for s in shown]), share([s[name] for s in strangers])
    return {**row, "mixes": len(pairs), "pictures": len(painted)}


def _tensor(pictures: Sequence) -> torch.Tensor:
    from zoo.probe.judge import stack

    return stack(pictures)


def _mean_psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    values = [v for v in psnr(a, b) if v != float("inf")]
    return round(sum(values) / len(values), 2) if values else 0.0


def evaluate_sketch(bench: Bench) -> tuple[dict[str, Figures], dict[str, torch.Tensor]]:
    """Figures and sheet pictures of every precision at every alpha."""
    options, device = bench.options, bench.device
    network = outliner.Outliner.load(options.outline, device)
    batch = scenes.sample(options.count, options.seed, "test")
    captions = scenes.describe(batch, options.seed)
    lines = [strokes.find(batch[part], options.size, device) for part in bench.parts(len(batch))]
    thin = torch.cat([part.thin() for part in lines])
    pages = torch.cat([strokes.neat(part, options.stroke) for part in lines])[:, None].expand(-1, 3, -1, -1)
    renders = rendered(batch, options.size, device)
    figures, sheets, first = {}, {}, {}
    for precision in options.precisions:
        columns = [pages[:24].cpu()]
        for alpha in options.alphas:
            began = time.perf_counter()
            painted = one_step(bench, precision, pages, [c.text for c in captions], alpha)
            row = sketch_figures(bench.probe, network, captions, thin, painted)
            row["psnr"] = _mean_psnr(first.setdefault(alpha, painted), painted)
            figures[f"{precision} alpha {alpha}"] = {**row, "seconds": round(time.perf_counter() - began, 2)}
            columns.append(painted[:24])
        sheets[f"sketch-{precision}"] = torch.stack([*columns, renders[:24]], 1).flatten(0, 1)
    figures["renders"] = sketch_figures(bench.probe, network, captions, thin, renders)
    return figures, sheets


def one_step(bench: Bench, precision: str, pages: torch.Tensor, prompts: list[str], alpha: float) -> torch.Tensor:
    """Sketches (B, 3, S, S) uint8 painted by the app's own sampler, each from its own seed: (B, 3, S, S) uint8."""
    from engine.lora import set_lora_strength
    from engine.models.sketch import sketch_to_image

    engine, size, out = bench.engine(precision), bench.options.size, []
    strength = functools.partial(set_lora_strength, engine, engine.spec.name)
    for part in bench.parts(len(pages)):
        seeds = range(FIRST_NOISE_SEED + part.start, FIRST_NOISE_SEED + part.stop)
        images = sketch_to_image(
            engine.pipe, pages[part].float() / 255, prompts[part], alpha,
            [torch.Generator("cpu").manual_seed(s) for s in seeds], height=size, width=size,
            max_sequence_length=engine.spec.max_sequence_length, strength=strength, output_type="pt",
        )  # fmt: skip
        out.append((images.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(out)


def sketch_figures(probe: Probe, network: outliner.Outliner, captions: Sequence[Caption], thin: torch.Tensor,
                   painted: torch.Tensor) -> Figures:  # fmt: skip
    """Figures of pictures painted from sketches whose object lines are `thin` (B, S, S) bool."""
    found, device = probe.detect(painted), thin.device
    iou = outliner.outline_iou(network.find(painted), thin)
    return {
        "outline_iou": round(float(iou.mean()), 4), "iou_tenth": round(float(iou.float().quantile(0.1)), 4),
        "canny_recall": canny_recall(painted.to(device), thin),
        "colors": share([all_colors(c, seen) for c, seen in zip(captions, found, strict=True)]),
        **{name: round(rates(captions, found)[name], 4) for name in ("objects", "relations")}, "pictures": len(painted),
    }  # fmt: skip


def canny_recall(painted: torch.Tensor, thin: torch.Tensor, tolerance: int = 2) -> float:
    """Mean share of line pixels with a Canny edge at most `tolerance` away."""
    edges = canny(painted, 50, 100)[:, None].float()
    near = torch.nn.functional.max_pool2d(edges, 2 * tolerance + 1, 1, tolerance).squeeze(1) > 0
    counts = thin.sum((1, 2)).clamp(min=1)
    return round(float(((near & thin).sum((1, 2)) / counts).mean()), 4)


def table(figures: dict[str, Figures]) -> str:
    """The figures as a Markdown table, a row each."""
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{values[n]:.4g}" if n in values else "-" for n in names) + " |"
              for row, values in figures.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


EVALUATIONS: dict[str, tuple[Callable, int, str]] = {
    "redux": (evaluate_redux, 8, "Redux: source and variation; first, second and their mix"),
    "sketch": (evaluate_sketch, 10, "Sketch, painted at each alpha, the render"),
}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device.replace("auto", "cpu")
    without_cudnn_attention()
    bench = Bench(options, device, Probe.load(options.probe, device))
    evaluate, columns, title = EVALUATIONS[options.kind]
    figures, sheets = evaluate(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    record = {
        "settings": settings,
        "machine": machine,
        "probe": bench.probe.report.get("held_out", {}),
        "rows": figures,
    }
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "RESULTS.md").write_text(f"# {title}\n\n{table(figures)}")
    for name, pictures in sheets.items():
        wide = 9 if name.startswith("mixes") else columns
        contact_sheet(pictures, columns=wide, cell=192).save(options.out / f"{name}.jpg", quality=88)
    print(table(figures))
    print(f"wrote {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zoo.evaluate_image", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    redux, sketch = kinds.add_parser("redux"), kinds.add_parser("sketch")
    for part in (redux, sketch):
        add = part.add_argument
        add("--model", default="tiny", help="catalogue name or diffusers folder of the base (default tiny)")
        add("--precisions", nargs="+", default=["bf16", "int4"], metavar="P", help="bf16, int4, int4@w4a4 ...; others "
            "are compared with the first (default bf16 int4)")  # fmt: skip
        add("--probe", type=Path, required=True, help="folder of a trained probe")
        add("--count", type=int, default=256, help="held-out cases (default 256)")
        add("--batch", type=int, default=64, help="pictures at a time (default 64)")
        add("--size", type=int, default=256, help="pixels (default 256)")
        add("--device", default="auto", help="auto, cpu or cuda[:N] (default auto)")
        add("--seed", type=int, default=EVALUATION_SEED, help=f"of scenes and captions (default {EVALUATION_SEED})")
        add("--out", type=Path, required=True, help="folder for the results")
    redux.add_argument("--redux", type=Path, required=True, help="folder of the prior pipeline; the LoRA in it, if "
        "there is one, is put on --model, in place of one that the catalogue gives it")  # fmt: skip
    redux.add_argument("--steps", type=int, default=12)
    redux.add_argument("--guidance", type=float, default=2.5)
    redux.add_argument("--text-length", type=int, default=0, help="tokens of the empty prompt (default: 512)")
    sketch.add_argument("--lora", type=Path, required=True, help="folder of the sketch LoRA")
    sketch.add_argument("--outline", type=Path, required=True, help="folder of the outline network")
    sketch.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS))
    sketch.add_argument("--stroke", type=float, default=1.0, help="half the strokes' width in half pixels (default 1)")
    return parser


if __name__ == "__main__":
    main()
