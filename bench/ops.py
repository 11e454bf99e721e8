"""Time the 4-bit linear beside torch's own, a row a case, on random data.

    python bench/ops.py                               # FLUX and SANA shapes, the backend the engine would choose
    python bench/ops.py --tiny                        # the small model's shapes, where the cost of a call counts
    python bench/ops.py --backend avx2 --onednn-isa AVX2 --json bench/results/ops-cpu-avx2.json

Rivals are timed in turns, and medians (with the fastest run beside) are shown, so that a busy machine slows all alike.
`--onednn-isa` holds torch to an instruction set, which it reads once, at start: the program starts itself again.
`--cpu-time` counts processor seconds of one thread instead of the clock: for machines that are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ISAS = ("AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX")


def main() -> None:
    """Parse the command line, time every case, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", help="amx, avx512, avx2, scalar or reference (default: the engine's choice)")
    parser.add_argument("--onednn-isa", choices=ISAS, help="hold torch to this instruction set")
    parser.add_argument("--mode", default="int8", choices=("int8", "int4", "uint4"), help="activation precision")
    parser.add_argument("--tiny", action="store_true", help="the small model's shapes")
    parser.add_argument("--quick", action="store_true", help="one shape a model, few repeats")
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts instead of the model's own")
    parser.add_argument("--threads", type=int, help="torch's thread count")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, processor time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine to FILE")
    options = parser.parse_args()
    if options.onednn_isa and os.environ.get("ONEDNN_MAX_CPU_ISA") != options.onednn_isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.onednn_isa
        os.execv(sys.executable, [sys.executable, *sys.argv])
    rows = run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**machine(options), "rows": rows}, indent=1) + "\n")


def run(options: argparse.Namespace) -> list[dict]:
    """Time the chosen shapes and print each row as soon as it is known."""
    import torch

    from engine import ops

    if options.cpu_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    options.backend = options.backend or ops.backends.select("cpu").name
    clock = time.thread_time if options.cpu_time else time.perf_counter
    print(f"{options.backend} {options.mode}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"oneDNN at most {os.environ.get('ONEDNN_MAX_CPU_ISA', 'what the processor has')}")  # fmt: skip
    print(f"{'case':18}{'M':>6}{'N':>7}{'K':>7}{'ours ms':>10}{'best':>9}{'TFLOP/s':>9}{'GB/s':>7}"
          f"{'bf16 ms':>10}{'x bf16':>8}{'int8 ms':>10}{'x int8':>8}")  # fmt: skip
    rows = []
    for name, m, n, k in cases(options):
        row = {"case": name, "m": m, "n": n, "k": k, **time_case(options, m, n, k, clock)}
        rows.append(row)
        print(f"{name:18}{m:6}{n:7}{k:7}{row['ms']:10.3f}{row['best_ms']:9.3f}{row['tflops']:9.3f}{row['gbs']:7.1f}"
              f"{row['bf16_ms']:10.3f}{row['ratio_bf16']:8.2f}{row['int8_ms']:10.3f}{row['ratio_int8']:8.2f}",
              flush=True)  # fmt: skip
    return rows


def cases(options: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """(name, M, N, K) of every row."""
    from bench.shapes import FLUX, FLUX_TOKENS, SANA, SANA_TOKENS, TINY, TINY_TOKENS

    tables = ((TINY, TINY_TOKENS),) if options.tiny else ((FLUX, FLUX_TOKENS), (SANA, SANA_TOKENS))
    chosen = []
    for shapes, counts in tables:
        for shape in shapes[1:2] if options.quick else shapes:
            for m in options.tokens or (counts[:1] if options.quick else counts):
                chosen.append((shape.name, m, shape.n, shape.k))
    return chosen


def time_case(options: argparse.Namespace, m: int, n: int, k: int, clock: Callable[[], float]) -> dict:
    """Median and least time of the 4-bit linear, torch's BF16 linear and torch's INT8 product, taken in turns."""
    import torch

    from engine import ops
    from tests.ops.cases import Case, random_linear

    packed = ops.pack(random_linear(Case(m, n, k, 32)), options.backend)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((m, k), (n, k), (n,)))
    codes, weight8 = torch.randint(-127, 128, (m, k)).to(torch.int8), torch.randint(-127, 128, (n, k)).to(torch.int8)
    rivals = {
        "ours": lambda: ops.svdq_linear(x, packed, options.mode),
        "bf16": lambda: torch.nn.functional.linear(x, weight, bias),
        "int8": lambda: torch._int_mm(codes, weight8.T),
    }
    rounds, aim = (3, 0.05) if options.quick else (9, 0.2)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    with torch.inference_mode():
        calls = {name: max(1, min(500, int(aim / seconds(call, 1, clock)))) for name, call in warm(rivals)}
        for _ in range(rounds):
            for name, call in rivals.items():
                times[name].append(seconds(call, calls[name], clock))
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = packed.nbytes + 2 * m * (k + n)
    return {
        "ms": median["ours"] * 1e3,
        "best_ms": min(times["ours"]) * 1e3,
        "tflops": 2 * m * n * k / median["ours"] / 1e12,
        "gbs": moved / median["ours"] / 1e9,
        "bf16_ms": median["bf16"] * 1e3,
        "ratio_bf16": median["bf16"] / median["ours"],
        "int8_ms": median["int8"] * 1e3,
        "ratio_int8": median["int8"] / median["ours"],
        "weight_bytes_of_bf16": packed.nbytes / (2 * n * k),
    }


def warm(rivals: dict[str, Callable[[], object]]) -> list[tuple[str, Callable[[], object]]]:
    """Call each rival twice, so that what it builds on first use is built."""
    for call in rivals.values():
        call()
        call()
    return list(rivals.items())


def seconds(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    """Mean seconds of `count` calls."""
    start = clock()
    for _ in range(count):
        call()
    return max((clock() - start) / count, 1e-7)


def machine(options: argparse.Namespace) -> dict:
    """What the figures were read on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor time of one thread" if options.cpu_time else "wall clock",
        "torch": torch.__version__,
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "backend": options.backend,
        "mode": options.mode,
        "rank": 32,
    }


if __name__ == "__main__":
    main()
