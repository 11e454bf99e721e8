"""The 4-bit linear of Hopper beside cuBLAS, at FLUX.1's four large shapes: TFLOP/s of CUDA graph replays, random data.

    python bench/hopper_linear.py --json bench/results/linear-h200.json

Ours is timed with the quantization of its tokens and without (`linear`: widening, low-rank branch and bias included),
and without a low-rank branch; `low_rank_share` is what the branch adds to quantization and linear together. Rivals:
torch's BF16 linear, and torch's FP8 product with row scales (`_scaled_mm`, fast accumulation), whose weights take twice
the memory. Needs compute capability 9.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json

SHAPES = ((4608, 12288, 3072), (4608, 3072, 12288), (4608, 9216, 3072), (4608, 3072, 3072), (4096, 3072, 3072),
          (512, 9216, 3072), (2048, 11200, 2240), (2048, 2240, 2240))  # fmt: skip


def microseconds(call: Callable[[], object], repeats: int = 15, inner: int = 8) -> float:
    """Median over `repeats` replays of a graph of `inner` calls, a call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / inner)
    return sorted(times)[repeats // 2]


def row(m: int, n: int, k: int, rank: int, tiles: list[int]) -> dict:
    """Microseconds of one shape, ours and the rivals'."""
    from bench.random_models import random_layer
    from engine import ops
    from engine.ops import cuda

    generator = torch.Generator("cuda").manual_seed(0)
    packed = ops.pack(random_layer(n, k, "svdq", rank, True, "cuda", generator), "sm90a")
    x = torch.randn(m, k, generator=generator, device="cuda").bfloat16()
    target = (packed.blob, packed.spec)
    act = cuda._quantize(x, [target])[0]
    times: dict = {"m": m, "n": n, "k": k}
    for tile in tiles:
        for name, start in (("narrow", 1 << 30), ("wide", 0)):
            if tile not in (0, 128, *((64, 176) if name == "narrow" else (192, 256))):
                continue
            cuda.WIDE_FROM = start
            run = lambda tile=tile: cuda._multiply(  # noqa: E731
                act, cuda._widen(act, *target), *target, torch.bfloat16, tile=tile
            )
            times[f"{name}{tile or ''}"] = microseconds(run)
    cuda.WIDE_FROM = WIDE_FROM
    times["linear"] = microseconds(lambda: cuda._multiply(act, cuda._widen(act, *target), *target, torch.bfloat16))
    times["ours"] = microseconds(lambda: ops.svdq_linear(x, packed, "fp8"))
    times["quantize"] = microseconds(lambda: cuda._quantize(x, [target]))
    bare = ops.pack(random_layer(n, k, "svdq", 0, True, "cuda", generator), "sm90a")
    times["ours_rank_0"] = microseconds(lambda: ops.svdq_linear(x, bare, "fp8"))
    times["quantize_rank_0"] = microseconds(lambda: cuda._quantize(x, [(bare.blob, bare.spec)]))
    weight, bias = torch.randn(n, k, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
    times["bf16"] = microseconds(lambda: torch.nn.functional.linear(x, weight, bias))
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    ones = torch.ones(m, 1, device="cuda"), torch.ones(1, n, device="cuda")
    fp8 = lambda: torch._scaled_mm(a, b.T, *ones, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    times["fp8"] = microseconds(fp8)
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
