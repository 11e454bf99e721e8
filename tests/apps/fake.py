"""An engine with the real one's interface and pictures that follow from the request, in milliseconds."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from PIL import Image

from apps.common.models import parted
from engine import Cancelled, Request, Result, Step
from engine.models.catalogue import ModelSpec

STEP_SECONDS = {"bf16": 0.02, "int4": 0.01, "nvfp4": 0.01}


class FakeEngine:
    """Paints a gradient whose colours are drawn from seed and prompt; 4 bits means 16 levels a channel.

    `gate`, when set, is waited for before every step, so that a test can hold a run where it wants it.
    """

    def __init__(self, spec: ModelSpec, precision: str, gate: threading.Semaphore | None = None) -> None:
        self.spec = spec
        self.precision = precision
        self.activation = "w16a16" if precision == "bf16" else "w4a8"
        self.backend = "torch" if precision == "bf16" else "avx512"
        self.device = "cpu"
        self.weight_bytes = 60_000_000 if precision == "bf16" else 17_000_000
        self.gate = gate
        self.runs: list[Request] = []

    def run(self, request: Request, on_step: Any = None, should_stop: Any = None) -> Result:
        request = request.resolved(self.spec)
        self.runs.append(request)
        start = time.perf_counter()
        for index in range(1, int(request.steps or 0) + 1):
            if self.gate is not None:
                self.gate.acquire()
            threading.Event().wait(STEP_SECONDS[parted(self.precision)[0]])
            if on_step:
                on_step(Step(index, int(request.steps or 0), time.perf_counter() - start))
            if should_stop and should_stop():
                raise Cancelled("the run was stopped")
        # Said, not measured: what the page makes of a figure must not depend on how busy the machine is.
        seconds = int(request.steps or 0) * STEP_SECONDS[parted(self.precision)[0]]
        return Result(
            image=paint(request, self.precision),
            request=request,
            model=self.spec.name,
            precision=self.precision,
            activation=self.activation,
            backend=self.backend,
            device="CPU",
            seconds=seconds,
            ms_per_step=1000 * seconds / (request.steps or 1),
            stages={"encode": 0.0, "denoise": seconds, "decode": 0.0},
            weight_bytes=self.weight_bytes,
            peak_bytes=2 * self.weight_bytes,
        )


def paint(request: Request, precision: str) -> Image.Image:
    """The picture of a request; the 4-bit one is the 16-bit one with its channels rounded to 16 levels."""
    width, height = int(request.width or 0), int(request.height or 0)
    draw = np.random.default_rng([request.seed, *request.prompt.encode()])
    corners = draw.integers(0, 256, (2, 2, 3)).astype(np.float64)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    pixels = (1 - y) * ((1 - x) * corners[0, 0] + x * corners[0, 1]) + y * ((1 - x) * corners[1, 0] + x * corners[1, 1])
    if precision != "bf16":
        pixels = np.rint(pixels / 17) * 17
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def loader(gate: threading.Semaphore | None = None, made: dict[str, FakeEngine] | None = None) -> Any:
    """A loader for the pool; `made` receives the engines by precision."""

    def load(spec: ModelSpec, precision: str, share: Any, progress: Any) -> FakeEngine:
        progress(f"loading the {precision.upper()} transformer of {spec.title}")
        engine = FakeEngine(spec, precision, gate)
        if made is not None:
            made[precision] = engine
        return engine

    return load
