"""Train the depth estimator: a small DepthAnything (DINOv2 backbone, DPT head) on renders and their exact depth.

    python -m zoo.train.depth_estimator --out runs/depth --minutes 5

Predicts inverse depth up to scale and shift, as the hub's models do, so that the depth app treats both alike. Writes
OUT/depth-tiny (for AutoModelForDepthEstimation and AutoImageProcessor), OUT/samples and OUT/logs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from zoo import scenes
from zoo.scenes.sheet import contact_sheet
from zoo.train import dist, supply, vocab
from zoo.train.control import Run, shared_arguments, start
from zoo.train.disguise import disguise, move
from zoo.train.graph import autocast, compiled
from zoo.train.log import Meter, plot, unless_it_fails
from zoo.train.maps import inverse_depth, rank_correlation, stretch, to_bytes
from zoo.train.optim import Clock, Ema, FlatModel

CONFIG = Path(__file__).parents[1] / "configs" / "depth_tiny.json"


def build(config: dict) -> nn.Module:
    """A DepthAnythingForDepthEstimation with random weights."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    layers = config["layers"]
    backbone = Dinov2Config(
        image_size=config["size"], patch_size=config["patch"], hidden_size=config["hidden"], num_hidden_layers=layers,
        num_attention_heads=config["heads"], mlp_ratio=config["mlp_ratio"],
        out_indices=[layers - 3, layers - 2, layers - 1, layers], apply_layernorm=True,
        reshape_hidden_states=False, layerscale_value=1.0,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone, patch_size=config["patch"], reassemble_hidden_size=config["hidden"],
            neck_hidden_sizes=config["neck"], fusion_hidden_size=config["fusion"], head_hidden_size=config["head"],
        )
    )  # fmt: skip
    nn.init.constant_(model.head.conv3.bias, 0.5)  # the last step is a ReLU: start where it passes gradients
    return model


def processor(size: int):
    """An image processor that needs neither torchvision nor anything but PIL and numpy."""
    try:
        from transformers import DPTImageProcessorPil as DPTImageProcessor
    except ImportError:  # before transformers 5 the plain name was the PIL one
        from transformers import DPTImageProcessor
    half = [0.5, 0.5, 0.5]
    return DPTImageProcessor(size={"height": size, "width": size}, keep_aspect_ratio=True, ensure_multiple_of=16,
                             image_mean=half, image_std=half)  # fmt: skip


@dataclasses.dataclass
class Pictures:
    image: torch.Tensor  # (P, 3, S, S) uint8
    depth: torch.Tensor  # (P, S, S) float16, metres


def save_processor(size: int, folder: Path) -> None:
    """Write the processor's file under the plain class name, which every version of transformers opens with or without
    torchvision."""
    processor(size).save_pretrained(folder)
    path = Path(folder) / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({**values, "image_processor_type": "DPTImageProcessor"}, indent=2, sort_keys=True) + "\n"
    )


def gather(run: Run, split: str, count: int, deadline: float) -> Pictures:
    """Render pictures with their depth until the deadline."""
    tokenizers = run.args.out / f"tokenizers-{run.world.rank}"
    if not tokenizers.exists():  # the scenes' worker processes write captions too
        words = vocab.vocabulary_words(scenes.vocabulary())
        vocab.build_clip(words, tokenizers / "tokenizer")
        vocab.build_t5(words, tokenizers / "tokenizer_2")
    images, depths = [], []
    for part in supply.shown(run.config["pool"], tokenizers, run.world, run.log, deadline, split=split, pictures=count,
                             seed=run.args.seed):  # fmt: skip
        images.append(part.drawn.image)
        depths.append(part.drawn.depth.half())
    run.log("cases", split=split, pictures=sum(map(len, images)))
    return Pictures(torch.cat(images), torch.cat(depths))


def loss_terms(prediction: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """Errors of predicted against wanted inverse depth, both (B, S, S) float32.

    `aligned` and `edges` are free of scale and shift (Ranftl et al. 2020, arXiv 1907.01341, section 5): the mean
    absolute difference after the best linear fit, and that of its gradients at four sizes. `plain` keeps the scale
    near 1.
    """
    gap = _fit(prediction, wanted) - wanted
    edges, at = 0.0, gap[:, None]
    for _ in range(4):
        edges = edges + (at[..., 1:] - at[..., :-1]).abs().mean() + (at[..., 1:, :] - at[..., :-1, :]).abs().mean()
        at = F.avg_pool2d(at, 2)
    return {"aligned": gap.abs().mean(), "edges": edges, "plain": (prediction - wanted).abs().mean()}


def _fit(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """a p + b with the a and b of each picture that bring p closest to t in the least squares."""
    mean = lambda v: v.mean((1, 2), keepdim=True)  # noqa: E731
    dp, dt = p - mean(p), t - mean(t)
    a = (mean(dp * dt) / (mean(dp * dp) + 1e-5)).clamp(0.0, 20.0)
    return a * dp + mean(t)


def train(model: nn.Module, pool: Pictures, valid: Pictures, run: Run, deadline: float) -> None:
    """Train in place until `deadline`; the module ends up holding the averaged weights."""
    config, world, args = run.config["train"], run.world, run.args
    flat = FlatModel(model, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema, clock = (
        Ema(flat, config["ema_exponent"]),
        Clock(world, deadline, warmup=config["warmup"], max_steps=args.max_steps),
    )
    meter = Meter(run.log, "depth", config["batch"] * world.size, 0.0, "", world.size)
    g = torch.Generator(world.device).manual_seed(args.seed * 1000 + world.rank)

    def work() -> dict[str, torch.Tensor]:
        rows = torch.randint(len(pool.image), (config["batch"],), generator=g, device=world.device)
        x, depth = move(pool.image[rows].float() / 255, pool.depth[rows].float(), g)
        x = disguise(x, g) * 2 - 1
        with autocast(world):
            prediction = model(x).predicted_depth
        terms = loss_terms(prediction.float(), inverse_depth(depth))
        loss = terms["aligned"] + 0.25 * terms["edges"] + 0.1 * terms["plain"]
        loss.backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}

    saved = time.time()
    with compiled([model.neck, model.head], config["compile"] and world.cuda) as attempt:
        running = True
        while running:
            flat.zero_grad()
            terms = attempt(work, flat.zero_grad)
            norm = flat.step(clock.factor)
            ema.update()
            meter.add(**terms, norm=norm)
            running = clock.tick()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7), progress=round(clock.progress, 3))
            if world.chief and running and time.time() - saved > config["save_seconds"]:
                saved = time.time()
                with ema.swapped():
                    run.log("depth", **validate(model, valid, world))
                    save(model, run)
    flat.flat.copy_(ema.flat)
    flat.broadcast()


@torch.no_grad()
def predict(model: nn.Module, x: torch.Tensor, world: dist.World, size: int = 64) -> torch.Tensor:
    """Inverse depth stretched to [0, 1] of pictures (B, 3, S, S) in [0, 1]: (B, S, S) float32."""
    model.eval()
    out = []
    for part in x.split(size):
        with autocast(world):
            out.append(stretch(model(part * 2 - 1).predicted_depth.float()))
    model.train()
    return torch.cat(out)


def validate(model: nn.Module, valid: Pictures, world: dist.World) -> dict[str, float]:
    """Mean rank correlation with the exact depth on held-out renders: plain, disguised, and as line drawings."""
    from zoo.train.disguise import drawing

    x, wanted = valid.image.float() / 255, inverse_depth(valid.depth.float())
    g = torch.Generator(world.device).manual_seed(2)
    kinds = {"rank": x, "rank_disguised": disguise(x, g, 0.0), "rank_drawn": drawing(x, g)}
    every = max(1, x.shape[-1] // 64)  # a quarter of the pixels each way is plenty for a mean
    part = lambda maps: maps[:, ::every, ::every]  # noqa: E731
    scores = {name: rank_correlation(part(predict(model, k, world)), part(wanted)) for name, k in kinds.items()}
    return {name: round(float(score.mean()), 4) for name, score in scores.items()}


def save(model: nn.Module, run: Run) -> None:
    """Write the model and its processor, float32, beside the target, then move them into place."""
    folder = run.args.out / "depth-tiny"
    new, old = folder.with_name("depth-tiny.new"), folder.with_name("depth-tiny.old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    save_processor(run.config["model"]["size"], new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def sheet(run: Run, model: nn.Module, valid: Pictures) -> None:
    """A contact sheet of held-out pictures, disguised: picture, estimate, exact depth."""
    settings, world = run.config["samples"], run.world
    x = valid.image[: settings["count"]].float() / 255
    x = disguise(x, torch.Generator(world.device).manual_seed(5), drawings=0.3)
    wanted = inverse_depth(valid.depth[: len(x)].float())
    grey = lambda maps: to_bytes(maps)[:, None].expand(-1, 3, -1, -1)  # noqa: E731
    columns = to_bytes(x), grey(predict(model, x, world)), grey(wanted)
    folder = run.args.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(torch.stack(columns, 1).flatten(0, 1), columns=6, cell=settings["cell"]).save(
        folder / "depth-tiny.jpg", quality=85
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared_arguments(parser, CONFIG, base=False)
    args = parser.parse_args(argv)
    run = start(args)
    try:
        pool = run.config["pool"]
        valid = gather(run, "test", pool["valid"], run.after(pool["seconds"]))
        data = gather(run, "train", pool["pictures"], run.after(pool["seconds"]))
        model = build(run.config["model"]).to(run.world.device).train()
        run.log("depth", parameters=sum(p.numel() for p in model.parameters()))
        train(model, data, valid, run, run.deadline(60 * args.minutes - run.config["reserve_seconds"]))
        if run.world.chief:
            run.log("depth", **validate(model, valid, run.world))
            save(model, run)
            unless_it_fails(run.log, "sheet", lambda: sheet(run, model, valid))
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
    finally:
        run.world.close()
        shutil.rmtree(args.out / f"tokenizers-{run.world.rank}", ignore_errors=True)


if __name__ == "__main__":
    main()
