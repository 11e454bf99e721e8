"""Train Redux: a small SigLIP tower and embedder whose tokens stand in for a prompt of the small FLUX.

    python -m zoo.train.redux --base zoo/weights/flux-tiny --out runs/redux --minutes 3.9
    python -m zoo.train.redux --link zoo/weights/redux-tiny --base zoo/weights/flux-tiny      after moving a folder

`--minutes` is the whole run by the wall clock. Writes OUT/model (FluxPriorReduxPipeline.from_pretrained opens it),
OUT/samples and OUT/logs. Two stages: the tower learns to name objects (seconds), then
flow matching through the transformer, conditioned as the two pipelines condition it: the empty prompt's states, then
the picture's tokens. Two pictures in five are mixes: the weighted sum of two pictures' tokens should paint the objects
of both. The transformer gets a LoRA, OUT/model/pytorch_lora_weights.safetensors: so small a one knows captions of a few
words and makes blobs of 144 tokens that are none (tried: colours right, shapes not).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxPriorReduxPipeline
from torch import nn

from zoo.scenes.sheet import contact_sheet
from zoo.train import control, flow, lora, models, redux_cases, redux_model, redux_paint, supply, vocab
from zoo.train.denoiser import Joint, blocks
from zoo.train.graph import autocast, compiled
from zoo.train.log import Log, Meter, plot, unless_it_fails
from zoo.train.optim import Clock, Ema, FlatModel
from zoo.train.redux_cases import Batch, Cases

CONFIG = Path(__file__).parents[1] / "configs" / "redux_tiny.json"
# The picture's words come in by the stream of the text.
TARGETS = (*lora.TARGETS, r"transformer_blocks\.\d+\.attn\.(add_q_proj|add_k_proj|add_v_proj)")


class Frozen(nn.Module):
    """The base, frozen but for its LoRA, and its empty prompt at every length that is needed."""

    def __init__(self, base: Path, config: dict, tokens: int, device: torch.device) -> None:
        super().__init__()
        self.base, self.parts, self.device = base, models.load(base), device
        self.joint = Joint(self.parts, config["pool"]["size"] // 8)
        self.requires_grad_(False).eval()
        lora.inject(self.parts.transformer, config["lora"]["rank"], 64, torch.eye(64), TARGETS)
        self.to(device)
        self.tokens, self.empty = tokens, {}
        for length in config["train"]["text_lengths"]:
            self.empty[length], self.empty[length + tokens] = self._states(length), self._states(length + tokens)
        clip, _ = vocab.encoders(base, 64)
        with torch.no_grad():
            self.pooled = self.joint.text.clip(input_ids=torch.from_numpy(clip([""])).long().to(device)).pooler_output

    @torch.no_grad()
    def _states(self, length: int) -> torch.Tensor:
        _, t5 = vocab.encoders(self.base, length)
        return self.joint.text.t5(input_ids=torch.from_numpy(t5([""])).long().to(self.device))[0]

    def velocity(
        self, x: torch.Tensor, sigmas: torch.Tensor, states: torch.Tensor, guidance: torch.Tensor
    ) -> torch.Tensor:
        """x (B, N, 64), states (B, L, D), sigmas and guidance (B,) -> (B, N, 64)."""
        return self.joint.velocity(x, sigmas, states, self.pooled.expand(len(x), -1), guidance)

    def conditioned(self, embeddings: torch.Tensor, length: int) -> torch.Tensor:
        """States as the prior pipeline joins them: the empty prompt, then the picture. (B, length + P, D)"""
        return torch.cat([self.empty[length].to(embeddings.dtype).expand(len(embeddings), -1, -1), embeddings], 1)

    def unconditioned(self, n: int, length: int) -> torch.Tensor:
        """The empty prompt over as many tokens, (n, length + P, D)."""
        return self.empty[length + self.tokens].expand(n, -1, -1)


@dataclasses.dataclass
class Learner:
    """What both stages need."""

    redux: redux_model.Redux
    frozen: Frozen
    cases: Cases
    valid: Cases
    run: control.Run

    def embed(self, b: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Embeddings of a batch's cases (n, P, D), and the losses of the heads."""
        states, single = self.redux.look(b.pictures)
        embeddings = b.mix(single)
        naming = F.binary_cross_entropy_with_logits(self.redux.head(embeddings), b.labels.float())
        return embeddings, {"naming": naming, "seeing": self.redux.place.loss(states, b.places)}


def learn_names(learner: Learner, config: dict, deadline: float) -> None:
    """Stage one: tower and embedder learn to name the objects of pictures and of mixes."""
    run, redux = learner.run, learner.redux
    model = FlatModel(redux, run.world, lr=config["lr"], betas=(0.9, 0.98), weight_decay=0.05)
    clock = Clock(run.world, deadline, warmup=config["warmup"], max_steps=run.args.max_steps)
    g = torch.Generator(run.world.device).manual_seed(run.args.seed * 1000 + run.world.rank + 3)
    meter = Meter(run.log, "names", config["batch"] * run.world.size, 0.0, "", run.world.size)
    running = True
    while running:
        b = learner.cases.batch(config["batch"], round(config["batch"] * config["mixed"]), g)
        model.zero_grad()
        with autocast(run.world):
            _, terms = learner.embed(b)
        (10 * terms["naming"] + terms["seeing"]).backward()
        norm = model.step(clock.factor)
        meter.add(loss=terms["naming"], seeing=terms["seeing"], norm=norm)
        running = clock.tick()
        meter.report(force=not running)
    model.broadcast()
    if run.world.chief:
        run.log("names", **named(learner))


@torch.no_grad()
def named(learner: Learner) -> dict[str, float]:
    """Shares of held-out labels found, and of those found that are true, for single pictures and for mixes."""
    out = {}
    for kind, mixed in (("one", 0), ("mix", 64)):
        b = learner.valid.batch(64, mixed, torch.Generator(learner.run.world.device).manual_seed(5))
        with autocast(learner.run.world):
            found = learner.redux.head(b.mix(learner.redux(b.pictures))) > 0
        right = (found & (b.labels > 0)).sum().item()
        out[f"{kind}_recall"] = round(right / max(1, int((b.labels > 0).sum())), 4)
        out[f"{kind}_precision"] = round(right / max(1, int(found.sum())), 4)
    return out


class Step:
    """One step of flow matching; returns the losses.

    Some rows are told nothing. Once there is a teacher (a copy of the weights that stands still, see `adapt`), one row
    in four learns the guided velocity, as the base answers to prompts: the truth, and (g - 1) times what the picture's
    tokens add to the empty prompt in the teacher's eyes.
    """

    def __init__(self, learner: Learner, model: FlatModel, config: dict) -> None:
        self.learner, self.model, self.config, run = learner, model, config, learner.run
        self.generator = torch.Generator(run.world.device).manual_seed(run.args.seed * 1000 + run.world.rank)
        self.count: int = 0
        self.teacher: torch.Tensor | None = None

    @property
    def first(self) -> bool:
        return self.count <= 2 * len(self.config["text_lengths"])

    def length(self, progress: float) -> int:
        """Text tokens of this step. The long layout costs most and waits; but the first steps meet (and compile) it."""
        lengths, self.count = self.config["text_lengths"], self.count + 1
        late = self.first or progress > self.config["long_from"]
        return lengths[self.count % len(lengths)] if late else lengths[0]

    def __call__(self, progress: float) -> dict[str, torch.Tensor]:
        n, g, config, world = self.config["batch"], self.generator, self.config, self.learner.run.world
        frozen, length = self.learner.frozen, self.length(progress)
        b = self.learner.cases.batch(n, round(n * config["mixed"]), g)
        sigmas = flow.sample_sigmas(n, config["mu"], g, uniform=0.2)
        x, target = flow.interpolate(b.x0, torch.randn(b.x0.shape, generator=g, device=g.device), sigmas)
        guidance, guided = torch.ones(n, device=g.device), torch.arange(0, n, 4, device=g.device)
        # The first steps take their own weights for a teacher, to meet (and compile) that path as well.
        teacher = self.model.flat.clone() if self.teacher is None and self.first else self.teacher
        if teacher is not None:
            low, high = config["guidance"]
            guidance[guided] = low + (high - low) * torch.rand(len(guided), generator=g, device=g.device)
            added = self.direction(teacher, b, x, sigmas, guided, length)
            target = target.index_add(0, guided, (guidance[guided] - 1).view(-1, 1, 1) * added)
        untold = torch.rand(n, generator=g, device=g.device) < config["drop"] * (guidance == 1)
        with autocast(world):
            embeddings, heads = self.learner.embed(b)
            states = frozen.conditioned(embeddings, length)
            states = torch.where(untold.view(-1, 1, 1), frozen.unconditioned(n, length).to(states.dtype), states)
            loss = flow.velocity_loss(frozen.velocity(x, sigmas, states, guidance), target)
        aid = config["naming"] * (1.1 - progress) * (heads["naming"] + 0.05 * heads["seeing"])
        (loss + aid).backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in heads.items()}}

    @torch.no_grad()
    def direction(
        self, teacher: torch.Tensor, b: Batch, x: torch.Tensor, sigmas: torch.Tensor, guided: torch.Tensor, length: int
    ) -> torch.Tensor:
        """What the pictures' tokens add to the teacher's velocity in the guided rows, (k, N, 64) float32."""
        frozen, twice = self.learner.frozen, lambda t: torch.cat([t[guided], t[guided]])
        with self.model.holding(teacher), autocast(self.learner.run.world):
            told = frozen.conditioned(self.learner.embed(b)[0], length)[guided]
            both = torch.cat([told, frozen.unconditioned(len(guided), length).to(told.dtype)])
            v = frozen.velocity(twice(x), twice(sigmas), both, torch.ones(len(both), device=x.device)).float()
        return v[: len(guided)] - v[len(guided) :]


def learn_flow(learner: Learner, config: dict, deadline: float) -> None:
    """Stage two. The networks end up holding the averaged weights."""
    run, redux = learner.run, learner.redux
    world, log, args = run.world, run.log, run.args
    transformer = learner.frozen.parts.transformer
    learning = nn.ModuleList([redux, transformer])
    model = FlatModel(
        learning, world, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"]
    )
    ema = Ema(model, config["ema_exponent"])
    clock = Clock(
        world, deadline, warmup=config["warmup"], max_steps=args.max_steps, burn=2 * len(config["text_lengths"]) + 1
    )
    tokens = learner.cases.latents.mean.shape[1]
    flops = 2.5 * flow.transformer_flops(
        dict(transformer.config), tokens, config["text_lengths"][0] + learner.frozen.tokens
    )
    meter = Meter(log, "flow", config["batch"] * world.size, flops, world.device.type, world.size)
    step, saved, running = Step(learner, model, config), time.time(), True
    with compiled(blocks(transformer), config["compile"] and world.cuda) as attempt:
        while running:
            model.zero_grad()
            terms = attempt(lambda: step(clock.progress), model.zero_grad)
            norm = model.step(clock.factor)
            ema.update()
            meter.add(**terms, norm=norm)
            running = clock.tick()
            if step.teacher is None and clock.progress >= config["guided_from"]:
                step.teacher = ema.flat.clone()
            meter.report(force=not running, lr=round(config["lr"] * clock.factor, 7), progress=round(clock.progress, 3))
            if world.chief and running and time.time() - saved > config["save_seconds"]:
                saved = time.time()
                with ema.swapped():
                    log("flow", **validate(learner, config))
                    save(learner, args.out / "model")
    model.flat.copy_(ema.flat)
    model.broadcast()
    if world.chief:
        log("flow", **validate(learner, config), **named(learner))


def save(learner: Learner, folder: Path) -> int:
    """The prior's folder with the LoRA in it. Returns bytes."""
    about = {"kind": "redux", "pipeline": "FluxPipeline"}
    return redux_model.save(learner.redux, folder) + lora.save(learner.frozen.parts.transformer, folder, about)


@torch.no_grad()
def validate(learner: Learner, config: dict) -> dict[str, float]:
    """Loss on held-out pictures and mixes at g = 1, the same noise each time; and with the pictures left out."""
    world, n = learner.run.world, min(128, config["batch"])
    g = torch.Generator(world.device).manual_seed(1)
    b = learner.valid.batch(n, n // 2, g)
    sigmas = (torch.arange(n, device=world.device) + 0.5) / n
    sigmas = sigmas[torch.randperm(n, generator=g, device=world.device)]
    x, target = flow.interpolate(b.x0, torch.randn(b.x0.shape, generator=g, device=world.device), sigmas)
    length, ones = config["text_lengths"][-1], torch.ones(n, device=world.device)
    with torch.compiler.set_stance("force_eager"), autocast(world):
        embeddings, _ = learner.embed(b)
        seen = learner.frozen.velocity(x, sigmas, learner.frozen.conditioned(embeddings, length), ones)
        unseen = learner.frozen.velocity(x, sigmas, learner.frozen.unconditioned(n, length), ones)
    error = lambda v: (v.float() - target).square().mean((1, 2))  # noqa: E731
    one, mix = error(seen).split([n - n // 2, n // 2])
    return {"valid": round(float(one.mean()), 5), "valid_mix": round(float(mix.mean()), 5),
            "without": round(float(error(unseen).mean()), 5)}  # fmt: skip


def prepare(run: control.Run) -> Learner:
    """The base, new networks that speak its language, held-out and training cases."""
    config, world, pool, base = run.config, run.world, run.config["pool"], run.args.base
    torch.manual_seed(run.args.seed)
    vision = config["vision"]
    frozen = Frozen(base, config, (vision["image_size"] // vision["patch_size"]) ** 2, world.device)
    redux_cases.on_device(frozen.parts.vae, world)
    redux = redux_model.Redux(vision, frozen.parts.transformer.config.joint_attention_dim).to(world.device)
    if run.args.resume:
        redux_model.restore(redux, run.args.resume)
        if (run.args.resume / lora.WEIGHTS).is_file():
            lora.restore(frozen.parts.transformer, run.args.resume)
    make = lambda split, count, deadline: redux_cases.build(  # noqa: E731
        frozen.parts.vae,
        pool,
        base,
        redux.size,
        redux.tokens,
        world,
        run.log,
        deadline,
        split=split,
        pictures=count,
        seed=run.args.seed,
    )
    valid = make("test", pool["valid"], time.time() + pool["seconds"])
    # Counted from here: the held-out cases were the first to wait for compilers and workers.
    cases = make("train", pool["scenes"], time.time() + pool["seconds"])
    if not run.args.resume:
        with torch.no_grad():
            ids = cases.t5[:256].long()
            states = frozen.joint.text.t5(input_ids=ids)[0][ids > 1]
        redux.begin_like(states, redux_cases.augment(cases.source[:64], torch.Generator(world.device).manual_seed(2)))
    sizes = {name: models.count(part) for name, part in (("tower", redux.tower), ("embedder", redux.embedder))}
    run.log("redux", tokens=frozen.tokens, **sizes)
    return Learner(redux, frozen, cases, valid, run)


@torch.no_grad()
def show(run: control.Run, valid: Cases, log: Log) -> None:
    """A sheet through the pipelines: source and variations at two strengths of guidance, halves and their mix."""
    config, device, out = run.config["samples"], run.world.device, run.args.out
    prior = FluxPriorReduxPipeline.from_pretrained(out / "model", dtype=torch.bfloat16).to(device)
    pipe = FluxPipeline.from_pretrained(run.args.base, dtype=torch.bfloat16).to(device)
    pipe.load_lora_weights(out / "model")
    pipe.set_progress_bar_config(disable=True)
    size, n = run.config["pool"]["size"], config["count"]
    vae, world = pipe.vae.float(), run.world
    originals = supply.decode(vae, valid.latents.mean[: 2 * n : 2], size, world).cpu()
    pipe.vae.to(torch.bfloat16)
    pairs = torch.nn.functional.interpolate(valid.halves[: 2 * n].float(), (size, size)).to(torch.uint8).cpu()
    kind = {"steps": config["steps"], "size": size}
    began, columns, titles = time.time(), [originals], ["source"]
    sources = [[p] for p in redux_paint.pil(originals)]
    for length in (None, 64):
        said = redux_paint.embed(prior, sources, [[1.0]] * len(sources), length)
        for guidance in config["guidance"]:
            columns.append(redux_paint.paint(pipe, *said, guidance=guidance, **kind))
            titles.append(f"guidance {guidance}, {length or redux_model.TEXT_LENGTH} text tokens")
    halves = redux_paint.pil(pairs)
    groups = [halves[2 * i : 2 * i + 2] for i in range(len(halves) // 2)]
    mixed = redux_paint.paint(pipe, *redux_paint.embed(prior, groups, [[0.5, 0.5]] * len(groups)),
                              guidance=config["guidance"][0], **kind)  # fmt: skip
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda name, parts, texts: contact_sheet(  # noqa: E731
        torch.stack(parts, 1).flatten(0, 1), texts * len(parts[0]), columns=len(parts) * 2, cell=config["cell"]
    ).save(folder / name, quality=85)
    write("variations.jpg", columns, titles)
    write("mixes.jpg", [pairs[0::2], pairs[1::2], mixed], ["first", "second", "half and half"])
    log("samples", pictures=len(originals) * len(columns), took=round(time.time() - began, 2))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    control.shared_arguments(parser, CONFIG)
    next(a for a in parser._actions if a.dest == "out").required = False
    parser.add_argument("--link", type=Path, help="only point this folder's text encoders at --base again")
    args = parser.parse_args(argv)
    if not args.link and not args.out:
        parser.error("--out is needed to train")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.link:
        redux_model.link(args.link, args.base)
        return
    run = control.start(args)
    try:
        learner, world = prepare(run), run.world
        end = run.deadline(60 * args.minutes - run.config["reserve_seconds"])
        if not args.resume:
            learn_names(learner, run.config["names"], min(end, time.time() + run.config["names"]["seconds"]))
        learn_flow(learner, run.config["train"], end)
        if world.chief:
            run.log("redux", bytes=save(learner, args.out / "model"))
            redux_model.link(args.out / "model", args.base)
            unless_it_fails(run.log, "sheets", lambda: show(run, learner.valid, run.log))
            unless_it_fails(run.log, "curves", lambda: plot(run.log.path, args.out / "logs" / "curves.png"))
            run.log("done", minutes=round((time.time() - run.began) / 60, 2))
        world.barrier()
    finally:
        run.world.close()


if __name__ == "__main__":
    main()
