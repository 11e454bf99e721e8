"""One denoising step of FLUX.1-dev at full size, this engine beside its rivals at their fastest, in one run.

    python bench/flux_step.py                                   # bf16 and int4, 1024x1024, batch 1
    python bench/flux_step.py bf16 fp8 int4 --json FILE         # fp8: torchao's rowwise FP8, fp8mm: by hand
    python bench/flux_step.py int4 --size 2048 --batch 1

Weights are random: the time of a step does not depend on them, and no download is needed. Every variant is compiled
(`compile_repeated_blocks`) unless its name ends in `-eager`; each is timed as it is called, then replayed as one CUDA
graph. Prints a line of JSON a variant: milliseconds (median and best), of the host alone too (until a call returns, the
device being idle before), GiB of weights, GiB at the peak, a hash of the output. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from bench.fp8_linear import is_large, replace_linears
from bench.random_models import CONFIG, dense, quantized, random_layer, random_nvfp4
from engine.models.switches import set_attention, set_wide_weights

GIB = 2**30
OURS = ("int4", "nvfp4")  # beginnings of variants that run on this engine


def torchao_fp8(model: nn.Module, tuned: bool = False) -> None:
    """torchao's dynamic rowwise FP8 on every large linear of the blocks, in place.

    `tuned` has Inductor try launch settings for every kernel that it writes (coordinate descent), as torchao advises:
    minutes of compiling, which did not end in four.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=tuned)
    quantize_(model, config, filter_fn=is_large)


def inputs(device: str, size: int, batch: int, config: dict, text: int = 512) -> dict[str, Any]:
    """What a pipeline hands over at a step."""
    side, generator = size // 16, torch.Generator(device).manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)  # noqa: E731
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)[None]
    return dict(
        hidden_states=made(batch, side * side, config["in_channels"]),
        encoder_hidden_states=made(batch, text, config["joint_attention_dim"]),
        pooled_projections=made(batch, config["pooled_projection_dim"]),
        timestep=torch.full((batch,), 0.5, device=device, dtype=torch.bfloat16),
        img_ids=ids.reshape(-1, 3).bfloat16(), txt_ids=torch.zeros(text, 3, device=device, dtype=torch.bfloat16),
        guidance=torch.full((batch,), 3.5, device=device), return_dict=False,
    )  # fmt: skip


@torch.no_grad()
def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median and least milliseconds by device events."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2], min(times)


@torch.no_grad()
def host_milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds until `call` returns, which is before the device is done: what the host spends on it."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    torch.cuda.synchronize()
    return sorted(times)[repeats // 2]


def digest(value: Tensor) -> str:
    """The bits of a tensor, in short."""
    return hashlib.sha256(value.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def recorded_by_engine(model: nn.Module, x: dict[str, Any]) -> tuple[Callable[[], Tensor], Tensor]:
    """A call that the engine records, with what it copies in and out, and what it gives."""
    from engine.graphs import record

    recorder = record(model)
    call = lambda: model(**x)[0]  # noqa: E731
    for _ in range(2):  # the second call of a shape is the recorded one
        call()
    if not recorder.recordings:
        raise RuntimeError(f"not recorded: {recorder.refused}")
    return call, call()


@torch.no_grad()
def recorded(call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The replay of `call` as a CUDA graph, and the tensor that it fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One variant: built, compiled, run, recorded."""
    kind = name.partition("-")[0]
    config = CONFIG | ({"num_layers": 2, "num_single_layers": 4} if options.few else {})

    def build() -> nn.Module:
        if kind in ("int4", "int4a4", "int4q8", "int4q16", "int4w", "int4wq8", "nvfp4"):
            layer = random_nvfp4 if kind == "nvfp4" else random_layer
            model = quantized("cuda", config, "w4a4" if kind == "int4a4" else "auto", options.rank, layer)
            set_attention(model, {"q8": "8bit", "16": "16bit"}.get(kind[-2:], "auto"))
            set_wide_weights(model, kind.startswith("int4w"))
            return model
        model = dense("cuda", config)
        if kind in ("fp8", "fp8tuned"):
            torchao_fp8(model, kind == "fp8tuned")
        elif kind == "fp8mm":
            replace_linears(model)
        return model

    return measured(name, build, lambda: inputs("cuda", options.size, options.batch, config), options)


def measured(
    name: str, build: Callable[[], Any], made: Callable[[], dict], options: argparse.Namespace
) -> dict[str, Any]:
    """The row of a model that `build` makes, for the inputs that `made` gives."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    began, before = time.time(), torch.cuda.memory_allocated()
    model = build()
    gc.collect()
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"variant": name, "weights_gib": (torch.cuda.memory_allocated() - before) / GIB}
    if not name.startswith(OURS):  # as a rival would have it: SANA's attention adds in float32
        torch.set_float32_matmul_precision("high")
    if not name.endswith("-eager"):
        # diffusers names the blocks that repeat in most models, not in SANA's.
        (model.compile_repeated_blocks if getattr(model, "_repeated_blocks", None) else model.compile)(fullgraph=True)
    x = made()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        first = model(**x)[0]
        torch.cuda.synchronize()
        row["setup_s"] = time.time() - began
        row["same_bits"] = bool(torch.equal(first, model(**x)[0]))
    row["finite"], row["digest"] = bool(first.isfinite().all()), digest(first)
    row["ms"], row["best_ms"] = timed(lambda: model(**x), options.repeats)
    row["host_ms"] = host_milliseconds(lambda: model(**x), options.repeats)
    row["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    replay, out = recorded_by_engine(model, x) if name.startswith(OURS) else recorded(lambda: model(**x)[0])
    row["graph_ms"], row["graph_best_ms"] = timed(replay, options.repeats)
    row["graph_host_ms"] = host_milliseconds(replay, options.repeats)
    row["graph_same_bits"] = bool(torch.equal(out, first))
    if options.profile:
        profile(replay)
    return row


@torch.no_grad()
def profile(call: Callable[[], Any]) -> None:
    """The kernels that take the most time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=60), flush=True)


def main() -> None:
    """Parse the command line, measure each variant, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["bf16", "int4"],
                        help="bf16, fp8, fp8tuned, fp8mm, int4, int4a4, nvfp4; int4q8 and int4q16 with attention in "
                        "8 and 16 bits, int4w with weights kept in 8 bits too, int4wq8 with both; with -eager not "
                        "compiled")  # fmt: skip
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--few", action="store_true", help="six blocks instead of 57, for trials")
    parser.add_argument("--profile", action="store_true", help="print the slowest kernels")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    settings = {"size": options.size, "batch": options.batch}
    report(options.variants, lambda name: measure(name, options), options.json, settings)


def report(names: Iterable[str], measure: Callable[[str], dict], path: Path | None, settings: dict) -> None:
    """Measure every variant, print each as a line of JSON, and keep `path` up to date after each of them."""
    rows: list[dict] = []
    for name in names:
        try:
            rows.append(measure(name))
        except Exception as error:
            rows.append({"variant": name, "error": f"{type(error).__name__}: {error}"[:500]})
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
        if path:
            write_json(path, machine(torch.device("cuda")) | settings | {"rows": rows})


if __name__ == "__main__":
    main()
