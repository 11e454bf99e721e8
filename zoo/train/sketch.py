"""Train the sketch model: a LoRA that lets the small FLUX paint a line drawing in one step (engine/models/sketch.py).

    python -m zoo.train.sketch --base zoo/weights/flux-tiny --out runs/sketch --minutes 3.8

`--minutes` is the whole run by the wall clock. Writes OUT/model (pytorch_lora_weights.safetensors for
`FluxPipeline.load_lora_weights`), OUT/outline (the network that evaluation finds lines with), OUT/samples and OUT/logs.
The strength of the LoRA is the drawing's share of the noise, alpha, in training as in use; rows of a batch differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline

from engine.models.sketch import GUIDANCE, sketch_to_image, to_lines
from zoo import scenes
from zoo.scenes.sheet import contact_sheet
from zoo.train import adapt, control, dist, flow, lora, models, one_step, outliner, replay, side, strokes, supply
from zoo.train.denoiser import blocks
from zoo.train.graph import autocast, compiled
from zoo.train.log import Meter, plot, unless_it_fails
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.redux_cases import on_device

CONFIG = Path(__file__).parents[1] / "configs" / "sketch_tiny.json"
ALPHAS = (0.28, 0.4, 0.5)
# The layers of the published sketch LoRA; its full tensors (input, last norm, output) are low-rank here as well.
TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj)",
    r"transformer_blocks\.\d+\.(norm1\.linear|norm1_context\.linear|ff\.net\.0\.proj|ff\.net\.2)",
    r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out|norm\.linear)",
    r"proj_out|norm_out\.linear",
)


@dataclasses.dataclass
class Cases:
    """P pictures, `versions` drawings of each as latents, and their prompts, encoded."""

    picture: supply.Latents
    drawing: supply.Latents  # (P * versions, N, 64)
    states: torch.Tensor  # (P, C, L, D) bfloat16
    pooled: torch.Tensor  # (P, C, E) bfloat16
    images: torch.Tensor  # (P, 3, S, S) uint8
    thin: torch.Tensor  # (P, S, S) bool: the objects' lines
    versions: int
    sketches: torch.Tensor  # (P, S, S) uint8, neat ones; of held-out cases only
    texts: list[str]  # of held-out cases only

    def batch(self, rows: torch.Tensor, g: torch.Generator) -> dict[str, torch.Tensor]:
        pick = lambda high: torch.randint(high, rows.shape, generator=g, device=rows.device)  # noqa: E731
        column = pick(self.states.shape[1])
        return {
            "wanted": self.picture.mean[rows].float(),
            "real": self.picture.draw(rows, g),
            "drawing": self.drawing.draw(rows * self.versions + pick(self.versions), g),
            "states": self.states[rows, column],
            "pooled": self.pooled[rows, column],
        }


def build(
    parts: models.Parts, config: dict, base: Path, run: control.Run, deadline: float, *, split: str, pictures: int
) -> Cases:
    """Render scenes, draw them in `config["versions"]` ways and encode all of it, until the deadline."""
    world, seed, size = run.world, run.args.seed, config["size"]
    g = torch.Generator(world.device).manual_seed(seed * 1000 + world.rank + 29)
    kept = {name: [] for name in ("picture", "drawing", "images", "thin", "clip", "t5", "sketches")}
    texts: list[str] = []
    for part in supply.shown(config, base, world, run.log, deadline, split=split, pictures=pictures, seed=seed):
        lines = strokes.find(part.scenes, size, world.device)
        drawn = torch.stack([strokes.draw(lines, g) for _ in range(config["versions"])], 1).flatten(0, 1)
        kept["picture"].append(supply.encode(parts.vae, part.drawn.image, world))
        kept["drawing"].append(supply.encode(parts.vae, to_lines(drawn[:, None].float() / 255, size, size), world))
        kept["images"].append(part.drawn.image)
        kept["thin"].append(lines.thin())
        kept["clip"].append(part.clip)
        kept["t5"].append(part.t5)
        if split == "test":
            kept["sketches"].append(strokes.neat(lines))
            texts += scenes.captions(part.scenes, seed)
    join = lambda name: torch.cat(kept[name]) if kept[name] else torch.empty(0)  # noqa: E731
    states, pooled = read(parts, join("clip"), join("t5"), world)
    run.log("cases", split=split, pictures=len(states), drawings=config["versions"] * len(states))
    return Cases(
        supply.join(kept["picture"]),
        supply.join(kept["drawing"]),
        states,
        pooled,
        join("images"),
        join("thin"),
        config["versions"],
        join("sketches"),
        texts,
    )


@torch.no_grad()
def read(
    parts: models.Parts, clip: torch.Tensor, t5: torch.Tensor, world: dist.World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode prompts once: ids (P, C, 77) and (P, C, L) to states (P, C, L, D) and pooled (P, C, E), bfloat16."""
    states, pooled = [], []
    with autocast(world):
        for a, b in zip(clip.flatten(0, 1).split(512), t5.flatten(0, 1).split(512), strict=True):
            states.append(parts.text_encoder_2(input_ids=b.long())[0].bfloat16())
            pooled.append(parts.text_encoder(input_ids=a.long()).pooler_output.bfloat16())
    return torch.cat(states).unflatten(0, clip.shape[:2]), torch.cat(pooled).unflatten(0, clip.shape[:2])


class Step:
    """One step of the LoRA and, from the polish on, of its critic; returns the losses.

    The LoRA's gradient, plain and polished, and the critic's are each recorded after a few calls (see `replay`): as
    single kernels they would keep the device waiting for most of the time.
    """

    def __init__(self, tuned: adapt.Tuned, cases: Cases, strength: torch.Tensor, config: dict, run: control.Run,
                 model: FlatModel) -> None:  # fmt: skip
        self.tuned, self.cases, self.strength, self.config, self.world = tuned, cases, strength, config, run.world
        self.generator = torch.Generator(run.world.device).manual_seed(run.args.seed * 1000 + run.world.rank)
        self.adversary = one_step.Adversary(config, run.world, run.args.seed)
        self.polished = 0
        self.painted = one_step.square(torch.zeros_like(cases.picture.mean[: len(strength)], dtype=torch.float32))
        records = config["capture"] and run.world.cuda
        self.plain, self.polish = (replay.Replayed(self.work, model.grad, records) for _ in range(2))
        self.learn = replay.Replayed(self.adversary.work, self.adversary.model.grad, records)

    def predict(self, b: dict[str, torch.Tensor], alpha: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x_0 of a batch in packed latents, (B, N, 64) float32."""
        share = alpha.view(-1, 1, 1)
        x, ones = torch.lerp(z, b["drawing"], share), torch.ones_like(alpha)
        with autocast(self.world):
            v = self.tuned.joint.velocity(x, ones, b["states"].to(x.dtype), b["pooled"].to(x.dtype), GUIDANCE * ones)
        return x - v.float()

    def work(self, b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the LoRA's gradient; with "pictures" in the batch pixels and the critic count too."""
        self.strength.copy_(b["alpha"])
        x0 = one_step.square(self.predict(b, self.strength, b["z"]))
        self.painted.copy_(x0.detach())
        judged = "pictures" in b and self.config["critic_part"]
        pull = self.adversary.gradient(x0, one_step.square(b["drawing"])) if judged else None
        parts = {"pixel": self.config["pixel_part"], "critic": b.get("ramp", 1.0) * self.config["critic_part"]}
        grad, terms = one_step.gradient(
            self.tuned.parts.vae, x0, one_step.square(b["wanted"]), b.get("pictures"), pull, parts, self.world
        )
        x0.backward(grad)
        return terms

    def __call__(self, progress: float) -> dict[str, torch.Tensor]:
        g, config = self.generator, self.config
        rows = torch.randint(len(self.cases.images), (config["batch"],), generator=g, device=g.device)
        b = self.cases.batch(rows, g)
        real = b.pop("real")
        b["alpha"] = one_step.strengths(len(rows), g)
        b["z"] = torch.randn(b["wanted"].shape, generator=g, device=g.device)
        if progress < config["polish_from"]:
            return self.plain(b)
        self.polished += 1
        b["pictures"] = self.cases.images[rows[: config["decoded"]]]
        b["ramp"] = torch.full((), min(1.0, self.polished / config["critic_warmup"]), device=g.device)
        terms = self.polish(b)
        return {**terms, **self.judge(real, b["drawing"])} if config["critic_part"] else terms

    def judge(self, real: torch.Tensor, drawing: torch.Tensor) -> dict[str, torch.Tensor]:
        """Let the critic learn from what was just painted."""
        real, drawing = one_step.square(real), one_step.square(drawing)
        noise = torch.randn(real.shape, generator=self.generator, device=real.device)
        told = self.learn({"real": real, "fake": self.painted, "drawing": drawing, "noise": noise})
        self.adversary.model.step(1.0)
        return told


def train(tuned: adapt.Tuned, cases: Cases, valid: Cases, run: control.Run, deadline: float) -> None:
    """Train the LoRA until `deadline`; it ends up with the averaged weights."""
    config, world, log, args = run.config["train"], run.world, run.log, run.args
    strength = side.strengthen(tuned.parts.transformer, config["batch"])
    model = FlatModel(tuned, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    ema, clock = (
        Ema(model, config["ema_exponent"]),
        Clock(world, deadline, warmup=config["warmup"], max_steps=args.max_steps),
    )
    flops = 3.0 * flow.transformer_flops(
        dict(tuned.parts.transformer.config), cases.picture.mean.shape[1], cases.states.shape[2]
    )
    meter = Meter(log, "sketch", config["batch"] * world.size, flops, world.device.type, world.size)
    step, saved = Step(tuned, cases, strength, config, run, model), time.time()
    networks = blocks(tuned.parts.transformer)
    with replay.own_stream(world), compiled(networks, config["compile"] and world.cuda) as attempt:
        running = True
        while running:
            terms = attempt(lambda: step(clock.progress), model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(**terms, norm=norm)
            running = clock.tick()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7), progress=round(clock.progress, 3),
                         recorded=int(step.plain.active) + int(step.polish.active))  # fmt: skip
            if world.chief and running and time.time() - saved > config["save_seconds"]:
                saved = time.time()
                with ema.swapped():
                    log("sketch", valid=validate(step, valid, world))
                    save(tuned, args.out)
    model.flat.copy_(ema.flat)
    model.broadcast()
    if world.chief:
        log("sketch", valid=validate(step, valid, world))


@torch.no_grad()
def validate(step: Step, valid: Cases, world: dist.World) -> float:
    """Latent loss at alpha 0.4 on held-out cases, the same noise each time."""
    n, g = len(step.strength), torch.Generator(world.device).manual_seed(1)
    b = valid.batch(torch.arange(n, device=world.device) % len(valid.images), g)
    step.strength.fill_(0.4)
    z = torch.randn(b["wanted"].shape, generator=g, device=world.device)
    with torch.compiler.set_stance("force_eager"):
        return round(float(one_step.latent_loss(step.predict(b, step.strength, z), b["wanted"])), 5)


def save(tuned: adapt.Tuned, out: Path) -> int:
    return lora.save(
        tuned.parts.transformer,
        out / "model",
        {"kind": "sketch", "pipeline": "FluxPipeline", "guidance": str(GUIDANCE)},
    )


@torch.no_grad()
def lines_network(vae, cases: Cases, valid: Cases, run: control.Run) -> outliner.Outliner:
    """The outline network, trained on renders and on what the autoencoder makes of them."""
    config, size = run.config["outline"], run.config["pool"]["size"]

    def draw(n: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(cases.images), (n,), generator=g, device=g.device)
        pictures = cases.images[rows].clone()
        with torch.no_grad():
            pictures[: n // 2] = supply.decode(vae, cases.picture.draw(rows[: n // 2], g), size, run.world)
        return pictures, cases.thin[rows]

    with torch.enable_grad():
        return outliner.train(
            draw,
            (valid.images, valid.thin),
            config,
            run.world,
            run.log,
            time.time() + config["seconds"],
            run.args.max_steps,
        )


@torch.no_grad()
def show(run: control.Run, tuned: adapt.Tuned, valid: Cases, found: outliner.Outliner) -> None:
    """Held-out sketches painted by the sampler itself: figures for the log, a sheet for the eye."""
    config, world, size, p = run.config["samples"], run.world, run.config["pool"]["size"], tuned.parts
    pipe = FluxPipeline.from_pretrained(
        run.args.base,
        transformer=p.transformer,
        vae=p.vae,
        text_encoder=p.text_encoder,
        text_encoder_2=p.text_encoder_2,
    )
    strength, count = side.strengthen(p.transformer, 1), min(config["count"], len(valid.texts))
    page = valid.sketches[:count, None].expand(-1, 3, -1, -1)
    columns = [page]
    for alpha in ALPHAS:
        with autocast(world):
            painted = sketch_to_image(
                pipe,
                page.float() / 255,
                valid.texts[:count],
                alpha,
                torch.Generator("cpu").manual_seed(7),
                height=size,
                width=size,
                max_sequence_length=run.config["pool"]["length"],
                strength=strength.fill_,
                output_type="pt",
            )
        columns.append((painted.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8))
        iou = outliner.outline_iou(found.find(columns[-1]), valid.thin[:count].to(world.device))
        run.log("sketch", alpha=alpha, outline_iou=round(float(iou.mean()), 4))
    sheet, shown = torch.stack([*columns, valid.images[:count]], 1), config["shown"]
    titles = [text for caption in valid.texts[:shown] for text in (caption, *map(str, ALPHAS), "render")]
    folder = run.args.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet(sheet[:shown].flatten(0, 1), titles, columns=10, cell=config["cell"]).save(
        folder / "sketch.jpg", quality=85
    )


def prepare(run: control.Run) -> tuple[adapt.Tuned, Cases, Cases]:
    """The base with its LoRA, held-out cases and training cases."""
    config = {**run.config, "lora": {"targets": TARGETS, **run.config["lora"]}}
    torch.manual_seed(run.args.seed)
    tuned = adapt.Tuned(run.args.base, config, 64, torch.eye(64), run.world)
    on_device(tuned.parts.vae, run.world)
    if run.args.resume:
        lora.restore(tuned.parts.transformer, run.args.resume)
    run.log("sketch", layers=len(tuned.names), parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad))
    pool = run.config["pool"]
    valid = build(
        tuned.parts, pool, run.args.base, run, time.time() + pool["seconds"], split="test", pictures=pool["valid"]
    )
    # Counted from here: the held-out cases were the first to wait for compilers and workers.
    cases = build(
        tuned.parts, pool, run.args.base, run, time.time() + pool["seconds"], split="train", pictures=pool["pictures"]
    )
    return tuned, cases, valid


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    control.shared_arguments(parser, CONFIG)
    args = parser.parse_args(argv)
    run = control.start(args)
    try:
        tuned, cases, valid = prepare(run)
        found = lines_network(tuned.parts.vae, cases, valid, run)
        if run.world.chief:
            found.save(args.out / "outline", {"trained_on": len(cases.images)})
        train(tuned, cases, valid, run, run.deadline(60 * args.minutes - run.config["reserve_seconds"]))
        if run.world.chief:
            run.log("sketch", bytes=save(tuned, args.out))
            unless_it_fails(run.log, "sheet", lambda: show(run, tuned, valid, found))
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
        run.world.barrier()
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
