"""The 4-bit linear of Ampere and later beside torch's BF16 one: microseconds and TOP/s of CUDA graph replays.

    python bench/ampere_linear.py --json bench/results/ampere-linear.json

`w4a4` is the product that the device gets by default, `w4a4_int8` and `w4a4_int4` the two there are (through INT8 and
INT4 units: the same bits); `w4a8` has 8-bit tokens. Low-rank branch and bias are in all of them, GELU and a gated add
where the name says so; `quantize_*` is what comes before. Needs compute capability 8.0 or more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from bench.hopper_linear import SHAPES, microseconds


def row(m: int, n: int, k: int, rank: int) -> dict:
    """Microseconds of one shape."""
    from bench.random_models import random_layer
    from engine import ops
    from engine.ops import sm80

    draw = torch.Generator("cuda").manual_seed(0)
    packed = ops.pack(random_layer(n, k, "svdq", rank, True, "cuda", draw), "sm80")
    x, weight = (torch.randn(size, k, generator=draw, device="cuda").bfloat16() for size in (m, n))
    y, gate = torch.zeros(1, m, n, dtype=torch.bfloat16, device="cuda"), torch.ones(1, n, device="cuda").bfloat16()
    make = partial(sm80.quantize_act, x, packed.blob, packed.spec, pairs=True)
    int4, int8 = make("int4"), make("int8")
    multiply = partial(sm80._multiply, blob=packed.blob, spec=packed.spec, y=y)
    calls: dict[str, Callable[[], object]] = {
        "w4a4": lambda: multiply(int4),
        "w4a4_int8": lambda: multiply(int4, form=1),
        "w4a4_int4": lambda: multiply(int4, form=2),
        "w4a4_gelu": lambda: multiply(int4, gelu=True),
        "w4a4_gated": lambda: multiply(int4, gate=gate),
        "w4a8": lambda: multiply(int8),
        "quantize_int4": lambda: make("int4"),
        "quantize_int8": lambda: make("int8"),
        "bf16": lambda: torch.nn.functional.linear(x, weight),
    }
    times = microseconds(calls)
    operations = 2e-6 * m * n * k
    told = {name: {"us": round(us, 1), "tops": round(operations / us, 1)} for name, us in times.items()}
    return {"m": m, "n": n, "k": k, **told}


def main() -> None:
    """Parse the command line, time every shape, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes (default all)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for m, n, k in SHAPES[: options.shapes]:
        rows.append(row(m, n, k, options.rank))
        cells = [f"{name} {value['us']:.0f} us" for name, value in rows[-1].items() if isinstance(value, dict)]
        print(f"M {m} N {n} K {k}: {', '.join(cells)}", flush=True)
        if options.json:
            write_json(options.json, machine(torch.device("cuda")) | {"rank": options.rank, "rows": rows})


if __name__ == "__main__":
    main()
