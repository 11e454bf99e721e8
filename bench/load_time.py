"""How long a 4-bit FLUX checkpoint takes to open, what host memory that costs, and how fast its LoRAs switch.

    python bench/synthetic_flux.py flux.safetensors && python bench/load_time.py flux.safetensors --device cuda

The file is read once before (so that it comes from the page cache). Host memory is the process's own, its mapped files
not counted; importing the libraries is timed apart. The LoRAs are random, one on every linear of the model and one on
those of the blocks. One step is run on the opened model, and its output looked at. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.flux_step import inputs
from engine.checkpoint.pretrained import SVDQuantFluxTransformer
from engine.lora import load_lora, set_lora_strength, set_lora_strengths, unload_lora
from engine.lora.targets import find_targets
from engine.lora.weights import Factors, LoraWeights

GIB = 2**30


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["RssAnon"].split()[0]) * 1024


class Peak:
    """The largest `own_memory` while it is open, above what it was before."""

    def __enter__(self) -> Peak:
        self.before = self.most = own_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = max(self.most, own_memory())

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, own_memory())


def warm(path: Path) -> None:
    """Bring the file into the page cache."""
    with path.open("rb") as file:
        while file.read(1 << 26):
            pass


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 7) -> float:
    """Median milliseconds of `call`, the device's work included."""
    times = []
    for _ in range(repeats):
        finish(device)
        began = time.perf_counter()
        call()
        finish(device)
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def random_lora(model: torch.nn.Module, rank: int, seed: int, everything: bool) -> LoraWeights:
    """Small random factors for the linears of the blocks, or for every linear there is."""
    generator, weights = torch.Generator().manual_seed(seed), LoraWeights()
    for target in find_targets(model):
        if everything or "transformer_blocks." in target.name:
            for name in target.parts:
                down = torch.randn(rank, target.layer.in_features, generator=generator).bfloat16() * 0.01
                up = torch.randn(target.rows, rank, generator=generator).bfloat16() * 0.01
                weights.factors[name] = Factors(down, up)
    return weights


def opened(path: Path, device: torch.device) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model of the file, and what opening it took."""
    import diffusers  # noqa: F401 - its import is not the file's own time
    from diffusers import FluxTransformer2DModel  # noqa: F401

    if device.type == "cuda":
        torch.empty(1, device=device)  # neither are the context's time and memory
        torch.cuda.reset_peak_memory_stats(device)
    with Peak() as peak:
        began = time.perf_counter()
        model = SVDQuantFluxTransformer.from_pretrained(path, device=device)
        finish(device)
        seconds = time.perf_counter() - began
    told: dict[str, Any] = {"load_s": seconds, "host_gib": (peak.most - peak.before) / GIB}
    if device.type == "cuda":
        told["device_gib"] = torch.cuda.memory_allocated(device) / GIB
        told["device_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return model, told


def measure(path: Path, device: torch.device, rank: int, size: int) -> dict[str, Any]:
    """Open the file, run a step, then put two LoRAs on, switch and remove them."""
    warm(path)
    model, told = opened(path, device)
    x = inputs(str(device), size, 1, dict(model.config))  # pyright: ignore[reportArgumentType]
    with torch.inference_mode():
        plain = model(**x)[0]
        told["finite"] = bool(plain.isfinite().all())
        told["step_ms"] = timed(lambda: model(**x), device, 3)
    first, second = random_lora(model, rank, 1, True), random_lora(model, rank, 2, False)
    told["lora_modules"] = [len(first.factors), len(second.factors)]
    began = time.perf_counter()
    load_lora(model, first, 1.0, "first")
    load_lora(model, second, 0.0, "second")
    finish(device)
    told["load_two_loras_s"] = time.perf_counter() - began
    steps = iter(range(1, 1000))
    told["strength_ms"] = timed(lambda: set_lora_strength(model, "first", 0.001 * next(steps)), device)

    def switch() -> None:
        on = next(steps) % 2
        set_lora_strengths(model, {"first": float(on), "second": float(1 - on)})

    told["switch_ms"] = timed(switch, device)
    unload_lora(model)
    with torch.inference_mode():
        told["same_bits_after_unloading"] = bool(torch.equal(plain, model(**x)[0]))
    return told


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rank", type=int, default=16, help="of each LoRA")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side of the picture that is stepped once")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    told = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "lora_rank": options.rank}
    told["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    told["file_gib"] = options.file.stat().st_size / GIB
    told |= measure(options.file, device, options.rank, options.size)
    text = json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in told.items()})
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
