"""Time pictures and denoising steps of a model in several precisions, taken in turns in one run.

    python bench/latency.py --model tiny --precisions bf16 int4
    python bench/latency.py --model dev --precisions bf16 bf16+compiled int4 nf4 --mode step --out results/dev
    python bench/latency.py --model tiny tiny-sana --precisions bf16 int4@w4a8 int4@w4a4 --mode end2end step

end2end: a whole picture as a user asks for it (text, steps, decoding). step: one forward pass of the transformer, on
the inputs that the pipeline really gives it. Every precision is warmed up, then they take turns, so that a busy or
throttled machine slows all alike. With --alone only one is in memory at a time and there are no turns.
Precisions: bf16, int4, nvfp4, NAME@w4a4, NAME@w4a8, NAME+compiled, LABEL=CHECKPOINT, nf4, int4wo, fp8.
Writes OUT.json (every time, the machine, versions), OUT.md (the table) and OUT.png (bars; needs matplotlib).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.times import Row, summary, table

PROMPT = "a large red metal sphere left of a small blue cube"
Call = Callable[[], dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, measure, print the table, write the files; returns the exit status."""
    from bench.evaluation.machine import machine, write_json, write_text
    from engine import EngineError
    from engine.devices import pick_device

    options = _parser().parse_args(arguments)
    try:
        about = machine(pick_device(options.device))
        rows = [row for model in options.model for row in measure_model(model, options)]
    except EngineError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    text = table(rows, about, measured(options))
    print(text)
    if options.out:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
        told = [dataclasses.asdict(row) | summary(row) for row in rows]
        write_json(options.out.with_suffix(".json"), {"machine": about, "settings": settings, "rows": told})
        write_text(options.out.with_suffix(".md"), text)
        _draw(rows, options.out.with_suffix(".png"))
    return 1 if any(row.error for row in rows) else 0


def _draw(rows: Sequence[Row], path: Path) -> None:
    from bench.evaluation.plots import durations

    try:
        durations(rows, path)
    except ImportError as error:
        say(f"no plot was drawn: pip install matplotlib ({error})")


def measure_model(model: str, options: argparse.Namespace) -> list[Row]:
    """All rows of one model: every precision in memory and in turns, or one after the other with --alone."""
    from bench.evaluation.variants import parse
    from engine.models.catalogue import resolve

    spec, variants = resolve(model), [parse(text) for text in dict.fromkeys(options.precisions)]
    request(spec, options)  # a wrong field is told before minutes of loading
    if not options.alone:
        return measure_together(spec, variants, options)
    rows = []
    for variant in variants:
        rows += measure_together(spec, [variant], options)
        release()
    return rows


def measure_together(spec: Any, variants: Sequence[Any], options: argparse.Namespace) -> list[Row]:
    """Load the variants, then time each mode in rounds in which each has its turn."""
    from bench.evaluation.variants import load

    engines: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        say(f"loading {spec.name} {variant.label}")
        start = time.perf_counter()
        try:
            engines[variant.label] = load(variant, spec, options.device, next(iter(engines.values()), None))
        except Exception as error:  # a rival that is missing must not cost the rest of the run
            failed[variant.label] = one_line(error)
        seconds[variant.label] = time.perf_counter() - start
    rows = []
    for mode in options.mode:
        make = end_to_end if mode == "end2end" else step
        makers = {name: functools.partial(make, engine, options) for name, engine in engines.items()}
        made = {v.label: Row(spec.name, v.label, mode, error=failed.get(v.label, "")) for v in variants}
        for name, engine in engines.items():
            made[name].backend, made[name].activation = engine.backend, engine.activation
            made[name].weight_bytes, made[name].load_seconds = engine.weight_bytes, seconds[name]
        take_turns(makers, made, engines, options)
        rows += made.values()
    return rows


def take_turns(
    makers: dict[str, Callable[[], Call]], rows: dict[str, Row], engines: dict[str, Any], options: Any
) -> None:
    """Make each call and warm it up, then time them round by round; one that fails is told and leaves the turns."""
    from bench.evaluation.memory import peak_of

    calls: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            calls[name] = make()
            for _ in range(options.warmup):
                calls[name]()
            held = held_modules(engines[name], rows[name].mode)
            rows[name].peak_bytes = peak_of(calls[name], engines[name].device, held)
        except Exception as error:
            rows[name].error = one_line(error)
            calls.pop(name, None)
    for number in range(options.repeats):
        say(f"{next(iter(rows.values())).mode}: round {number + 1} of {options.repeats}")
        for name, call in calls.items():
            start = time.perf_counter()
            stages = call()
            rows[name].times.append(1000 * (time.perf_counter() - start))
            if stages:
                rows[name].stages.append({stage: 1000 * value for stage, value in stages.items()})


def end_to_end(engine: Any, options: argparse.Namespace) -> Call:
    """A call that makes one picture and tells the seconds of its stages."""
    asked = request(engine.spec, options)
    return lambda: dict(engine.run(asked).stages)


def step(engine: Any, options: argparse.Namespace) -> Call:
    """A call that runs the transformer once, on what the pipeline gives it in a picture's first step."""
    import torch

    model, seen = engine.pipe.transformer, []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        engine.run(dataclasses.replace(request(engine.spec, options), steps=1))
    finally:
        hook.remove()
    args, kwargs = seen[-1]

    @torch.inference_mode()
    def call() -> dict[str, float]:
        model(*args, **kwargs)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return {}

    return call


def request(spec: Any, options: argparse.Namespace) -> Any:
    """The picture to make, checked against the model's limits."""
    from engine import Request

    size = {"width": options.size, "height": options.size}
    return Request(options.prompt, options.seed, options.steps, options.guidance, **size).resolved(spec)


def held_modules(engine: Any, mode: str) -> list[Any]:
    """The modules a run keeps in memory: the transformer, and end to end the encoders and the VAE too."""
    import torch

    if mode == "step":
        return [engine.pipe.transformer]
    return [part for part in engine.pipe.components.values() if isinstance(part, torch.nn.Module)]


def measured(options: argparse.Namespace) -> str:
    """How the times were taken, in words."""
    turns = "one after the other" if options.alone else "in turns"
    return f"{options.warmup} runs to warm up, {options.repeats} timed {turns}"


def release() -> None:
    """Give memory back between precisions that must not share it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """An error as a cell of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")[:300]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], help="names, folders or hub ids (default tiny)")
    add("--precisions", nargs="+", default=["bf16", "int4"], metavar="P", help="the first is what others are beside")
    add("--mode", nargs="+", default=["end2end", "step"], choices=("end2end", "step"), help="default both")
    add("--warmup", type=_count(1), default=2, help="untimed runs of each (default 2)")
    add("--repeats", type=_count(1), default=10, help="timed rounds (default 10)")
    add("--prompt", default=PROMPT)
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="denoising steps of end2end (default the model's)")
    add("--guidance", type=float, help="guidance scale (default the model's)")
    add("--size", type=int, help="pixels of a side (default the model's)")
    add("--device", default="auto", help="auto, cpu or cuda[:index]")
    add("--alone", action="store_true", help="hold one precision at a time; for models that do not fit together")
    add("--out", type=Path, metavar="STEM", help="write STEM.json, STEM.md and STEM.png")
    return parser


def _count(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
        return int(text)

    return whole


if __name__ == "__main__":
    raise SystemExit(main())
