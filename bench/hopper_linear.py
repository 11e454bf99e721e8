"""The 4-bit linear of Hopper beside cuBLAS, at FLUX.1's four large shapes: TFLOP/s of CUDA graph replays, random data.

    python bench/hopper_linear.py --json bench/results/linear-h200.json

Ours is timed with the quantization of its tokens and without (`linear`: widening, low-rank branch and bias included),
and without a low-rank branch; `low_rank_share` is what the branch adds to quantization and linear together.
`linear_kept` has its weights in 8 bits already (--wide-weights). Everything has its turn in each round. `streaming` and
`resident` are two of quantize_act's forms, where the shape has both; hopper_quantize.py has the third, and norms.
Rivals: torch's BF16 linear, and torch's FP8 product with row scales (`_scaled_mm`, fast accumulation), whose weights
take twice the memory. Needs compute capability 9.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json

SHAPES = ((4608, 12288, 3072), (4608, 3072, 12288), (4608, 9216, 3072), (4608, 3072, 3072), (4096, 3072, 3072),
          (512, 9216, 3072), (2048, 11200, 2240), (2048, 2240, 2240))  # fmt: skip


def recorded(call: Callable[[], object], inner: int) -> torch.cuda.CUDAGraph:
    """A graph of `inner` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return graph


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = 15, inner: int = 8) -> dict[str, float]:
    """Medians over `rounds`, in each of which every call has its turn: what moves the card's clock moves all alike."""
    graphs = {name: recorded(call, inner) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / inner)
    return {name: sorted(found)[rounds // 2] for name, found in times.items()}


def row(m: int, n: int, k: int, rank: int, tiles: list[int]) -> dict:
    """Microseconds of one shape, ours and the rivals'."""
    from bench.random_models import random_layer
    from engine import ops
    from engine.ops import cuda

    generator = torch.Generator("cuda").manual_seed(0)
    packed, bare = (ops.pack(random_layer(n, k, "svdq", some, True, "cuda", generator), "sm90a") for some in (rank, 0))
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    target, plain = (packed.blob, packed.spec), (bare.blob, bare.spec)
    kept = cuda.widened(*target)
    act, act_0 = (cuda._quantize(x, [it])[0] for it in (target, plain))

    def multiply(act: ops.QuantizedAct, it: tuple, tile: int = 0, wide_from: int = WIDE_FROM) -> torch.Tensor:
        cuda.WIDE_FROM = wide_from
        y = cuda._multiply(act, cuda._widen(act, *it), *it, torch.bfloat16, tile=tile)
        cuda.WIDE_FROM = WIDE_FROM
        return y

    weight, bias = torch.randn(n, k, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    ones = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    calls: dict[str, Callable[[], object]] = {
        "linear": lambda: multiply(act, target),
        "linear_rank_0": lambda: multiply(act_0, plain),
        "ours": lambda: ops.svdq_linear(x, packed, "fp8"),
        "ours_rank_0": lambda: ops.svdq_linear(x, bare, "fp8"),
        "quantize": lambda: cuda._quantize(x, [target]),
        "quantize_rank_0": lambda: cuda._quantize(x, [plain]),
        "quantize_streaming": lambda: cuda._quantize(x, [target], form=1),
        "quantize_resident": lambda: cuda._quantize(x, [target], form=2),
        "quantize_streaming_rank_0": lambda: cuda._quantize(x, [plain], form=1),
        "quantize_resident_rank_0": lambda: cuda._quantize(x, [plain], form=2),
        "linear_kept": lambda: cuda._multiply(act, kept, *target, torch.bfloat16),
        **({"widen": lambda: cuda._widen(act, *target)} if m >= WIDE_FROM else {}),
        "bf16": lambda: torch.nn.functional.linear(x, weight, bias),
        "fp8": lambda: torch._scaled_mm(a, b.T, *ones, out_dtype=torch.bfloat16, use_fast_accum=True),
    }
    for tile in tiles:
        for name, start in (("narrow", 1 << 30), ("wide", 0)):
            if tile in (0, 128, *((64, 176) if name == "narrow" else (192, 224, 256))):
                calls[f"{name}{tile or ''}"] = partial(multiply, act, target, tile, start)
    times = {"m": m, "n": n, "k": k} | microseconds(calls)
    flops = 2e-6 * m * n * k
    told = {key: value if key in "mnk" else {"us": round(value, 1), "tflops": round(flops / value, 1)}
            for key, value in times.items()}  # fmt: skip
    told["against_bf16"] = round(times["bf16"] / times["linear"], 2)
    told["low_rank_share"] = round(times["ours"] / times["ours_rank_0"] - 1, 3)
    return told


WIDE_FROM = 1024


def main() -> None:
    """Parse the command line, time every shape, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tiles", type=int, nargs="*", default=[], help="also time these tile sizes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows.append(row(*shape, options.rank, options.tiles))
        print(json.dumps(rows[-1]), flush=True)
        if options.json:
            write_json(options.json, machine(torch.device("cuda")) | {"rank": options.rank, "rows": rows})


if __name__ == "__main__":
    main()
