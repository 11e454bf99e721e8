"""Norm and quantization of Hopper's W4A8 tokens in their forms: microseconds of CUDA graph replays, random data.

    python bench/hopper_quantize.py --json bench/results/quantize-h100.json

Every form has its turn in each round. `streaming`, `resident` and `rows` are QuantizeForm in csrc/cuda/kernels.h; a
form that does not serve a row's shape is left out. `floor` is the time of the bytes alone at --bandwidth. A shape's
tokens may lie in the L2 from the call before, as they do in a model. Needs compute capability 9.0.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.evaluation.machine import machine, write_json
from bench.hopper_linear import microseconds

FORMS = {"streaming": 1, "resident": 2, "rows": 3}
TOKENS = (512, 1536, 4608, 16896)


def row(m: int, k: int, ranks: list[int], normed: bool, bandwidth: float) -> dict:
    """Microseconds of one shape in every form that serves it."""
    from bench.random_models import random_layer
    from engine import ops
    from engine.ops import cuda

    generator = torch.Generator("cuda").manual_seed(0)
    layers = [ops.pack(random_layer(128, k, "svdq", rank, True, "cuda", generator), "sm90a") for rank in ranks]
    targets = [(layer.blob, layer.spec) for layer in layers]
    x, scale, shift = (torch.randn(size, k, generator=generator, device="cuda").bfloat16() for size in (m, 1, 1))
    norm = (scale, shift, 1e-6) if normed else None
    forms = [name for name in FORMS if name != "resident" or (not normed and len(ranks) == 1)]
    times = microseconds({name: partial(cuda._quantize, x, targets, norm, form=FORMS[name]) for name in forms})
    floor = m * k * (2 + len(ranks)) / bandwidth * 1e-6
    told = {name: round(value, 1) for name, value in ({"floor": floor} | times).items()}
    return {"m": m, "k": k, "ranks": ranks, "norm": normed} | told


def main() -> None:
    """Parse the command line, time every shape, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--k", type=int, default=3072)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--bandwidth", type=float, default=3.35, help="of device memory, TB/s")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for m in options.tokens:
        for count, normed in ((1, False), (1, True), (2, True)):
            rows.append(row(m, options.k, [options.rank] * count, normed, options.bandwidth))
            print(json.dumps(rows[-1]), flush=True)
            if options.json:
                write_json(options.json, machine(torch.device("cuda")) | {"rows": rows})


if __name__ == "__main__":
    main()
