"""Paint prompt sets with a model in several precisions, score the pictures, and put the figures into one table.

    python bench/evaluate.py --model tiny --precisions bf16 int4 int4@w4a4 --prompts zoo --count 256 --out results/tiny
    python bench/evaluate.py --model dev --prompts mjhq:DIR sdci:DIR --count 5000 --metrics fid clip psnr --out DIR
    torchrun --nproc-per-node 8 bench/evaluate.py --model dev --precisions bf16 int4 --prompts mjhq:DIR --out DIR
    python bench/evaluate.py --only score --metrics image-reward --prompts mjhq:DIR --out DIR ...

Prompt sets: zoo (captions of the small models), a .txt, .json or .yaml FILE, mjhq:DIR (meta_data.json and
mjhq30k_imgs.zip), sdci:DIR (sDCI.yaml and sDCI.gz). The first precision is the one that others are compared with; all
start from the same noise. Run the same command again after a kill: finished pictures and scores are kept.
Under torchrun or accelerate launch each process paints its share; --shard I/N does so by hand.
Writes OUT/SET/PRECISION/NAME.png, results.json, RESULTS.md, and plots.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, paint, score, write; returns the exit status."""
    from engine.errors import EngineError

    options = _parser().parse_args(arguments)
    try:
        run(options)
    except EngineError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    """The whole evaluation, or the part that --only names."""
    from bench.evaluation.painting import Shard
    from bench.evaluation.scores import Settings, prepare
    from bench.evaluation.sets import read_set

    shard = Shard.parse(options.shard) if options.shard else Shard.of_this_process()
    device = shard.device(options.device)
    sets = [read_set(text, options.count) for text in dict.fromkeys(options.prompts)]
    scoring = options.only != "paint" and not options.shard and shard.index == 0
    settings = Settings(_score_device(device), options.clip, options.image_reward, options.probe)
    models = prepare(options.metrics, sets, settings) if scoring else {}
    if options.only != "score":
        paint_all(options, sets, shard, device)
        shard.wait_for_all()
    if scoring:
        score_all(options, sets, models, settings)


def paint_all(options: argparse.Namespace, sets: Sequence[Any], shard: Any, device: str) -> None:
    """Paint this process's share of every set in every precision, one precision in memory at a time."""
    from tqdm import tqdm

    from bench.evaluation.painting import paint
    from bench.evaluation.variants import check, load, parse
    from engine.models.catalogue import resolve

    spec, variants = resolve(options.model), [parse(text) for text in dict.fromkeys(options.precisions)]
    for variant in variants:
        check(variant, spec)
    if shard.index == 0:
        remember(options.out, {v.label: {"model": spec.source, **dataclasses.asdict(v)} for v in variants})
    asked = {"steps": options.steps, "guidance": options.guidance, "width": options.size, "height": options.size}
    for variant in variants:
        # One engine for all sets, and none where all is painted.
        engine = functools.cache(functools.partial(load, variant, spec, device))
        for prompts in sets:
            items = prompts.items[shard.index :: shard.count]
            folder = options.out / prompts.name / variant.label
            with tqdm(total=len(items), desc=f"{prompts.name} {variant.label}", disable=shard.index > 0) as bar:
                paint(engine, spec, items, folder, asked, bar.update)
        engine.cache_clear()
        _release()


def score_all(options: argparse.Namespace, sets: Sequence[Any], models: dict[str, Any], settings: Any) -> None:
    """Score every set, then write the table, the JSON and the plots."""
    import torch

    from bench.evaluation import plots
    from bench.evaluation.machine import machine, write_json, write_text
    from bench.evaluation.scores import score
    from bench.evaluation.table import figures, markdown

    about, metrics = machine(torch.device(settings.device)), list(dict.fromkeys(options.metrics))
    labels = [text.rpartition("=")[0] or text for text in dict.fromkeys(options.precisions)]
    results, counts = {}, {}
    for prompts in sets:
        kept = options.out / prompts.name
        folders = {label: kept / label for label in labels}
        if "fid" in metrics:
            references(prompts, kept / "references", about)
        results[prompts.name] = score(prompts, folders, metrics, models, settings, kept, say)
        counts[prompts.name] = len(prompts.items)
        plots.sheet(prompts, folders, options.out / f"{prompts.name}-examples.png")
    text = markdown(results, counts, about)
    asked = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    rows = [
        {"set": name, "pictures": counts[name], "precision": column.precision, **figures(column)}
        for name, columns in results.items()
        for column in columns
    ]
    write_json(options.out / "results.json", {"machine": about, "settings": asked, "rows": rows})
    write_text(options.out / "RESULTS.md", f"# {options.model}\n\n{text}")
    print(text)
    try:
        for name, columns in results.items():
            plots.bars(name, columns, options.out / f"{name}-figures.png")
            plots.curves(name, columns, options.out / f"{name}-psnr.png")
    except ImportError as error:
        say(f"no plots were drawn: pip install matplotlib ({error})")


def references(prompts: Any, folder: Path, about: Any) -> None:
    """Lay out the real pictures of a set: from its archive, or as renders of the scenes that captions describe."""
    if prompts.references is not None:
        prompts.references.copy([item.name for item in prompts.items], folder)
    elif prompts.scenes is not None and not folder.is_dir():
        from engine.checkpoint.files import replacing
        from zoo import scenes

        say("rendering the scenes of the captions")
        with replacing(folder) as partial:
            names = iter(item.name for item in prompts.items)
            for part in scenes.stream(prompts.scenes, device="cpu"):
                for image in part.image.cpu():
                    _picture(image).save(partial / f"{next(names)}.png")


def remember(out: Path, variants: dict[str, Any]) -> None:
    """Keep what each label of a folder stands for; raises ArgumentError when it stood for something else."""
    from bench.evaluation.machine import write_json
    from engine.errors import ArgumentError

    path = out / "variants.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for label, wanted in variants.items():
        if known.get(label, wanted) != wanted:
            raise ArgumentError(
                f"--out: {out} holds pictures of {label} = {known[label]}, now it is {wanted}:"
                " use another folder or label"
            )
    write_json(path, known | variants)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _picture(image: Any) -> Any:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _release() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _score_device(device: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="a name, a folder or a hub id (default tiny)")
    add("--precisions", nargs="+", default=["bf16", "int4"], metavar="P",
        help="bf16, int4, NAME@w4a4, NAME@w4a8, LABEL=CHECKPOINT, nf4, int4wo, fp8 (default bf16 int4)")  # fmt: skip
    add("--prompts", nargs="+", default=["zoo"], metavar="SET", help="zoo, FILE, mjhq:DIR, sdci:DIR (default zoo)")
    add("--count", type=_count, help="pictures of each set (default all; of zoo 256); figures in papers use 5000")
    add("--metrics", nargs="+", default=["psnr", "ssim"], metavar="M",
        help="psnr ssim lpips clip image-reward fid probe (default psnr ssim)")  # fmt: skip
    add("--only", choices=("paint", "score"), help="stop after painting, or score what is painted")
    add("--shard", metavar="I/N", help="paint every Nth picture from the Ith (from 0), and score nothing")
    add("--steps", type=int, help="denoising steps (default the model's)")
    add("--guidance", type=float, help="guidance scale (default the model's)")
    add("--size", type=int, help="pixels of a side (default the model's)")
    add("--device", default="auto", help="auto, cpu or cuda[:index]; one GPU a process under torchrun")
    add("--clip", default="openai/clip-vit-large-patch14", help="CLIP model, a hub id or a folder")
    add("--image-reward", default="ImageReward-v1.0", help="ImageReward model, its name or a file")
    add("--probe", type=Path, default=ROOT / "zoo" / "weights" / "probe", help="folder of the zoo's probe")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of pictures and figures; go on by naming it again",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
