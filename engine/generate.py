"""Load a model in a precision and make pictures with it.

As a command:

    python -m engine.generate "a red cube" --model tiny --precision bf16 int4 --seed 7 --out pictures
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine import graphs, ops
from engine.devices import pick_device
from engine.errors import ArgumentError, Cancelled
from engine.linear import SVDQuantLinear, resolve_activation
from engine.memory import PeakMeter, module_bytes
from engine.models import loading
from engine.models.catalogue import ModelSpec, resolve
from engine.models.families import runner
from engine.models.switches import attention_of, check_attention, set_attention, set_wide_weights
from engine.preview import Watch
from engine.request import Request, Result, Step
from engine.residency import Room, room_on

__all__ = ["Engine"]

OnStep = Callable[[Step], None]
ShouldStop = Callable[[], bool]
Progress = Callable[[str], None]


class Engine:
    """One model in one precision on one device, ready to run. Make it with `Engine.load`.

    An engine runs one request at a time; callers that share a device share a lock.
    """

    def __init__(self, spec: ModelSpec, precision: str, activation: str, backend: str, device: torch.device, pipe: Any):
        self.spec = spec
        self.precision = precision
        self.activation = activation
        self.wide_weights = False
        self.backend = backend
        self.device = device
        self.pipe = pipe
        self.runner = runner(spec)
        self.weight_bytes = module_bytes(pipe.transformer)
        if device.type == "cuda":
            graphs.record(pipe.transformer)
        self._warm: set[tuple[int, int]] = set()
        self._worn: dict[str, float] = {}

    @classmethod
    def load(
        cls,
        model: str | ModelSpec = "tiny",
        precision: str = "int4",
        *,
        device: str = "auto",
        activation: str = "auto",
        attention: str = "auto",
        wide_weights: bool = False,
        vram_budget: float | None = None,
        offload: bool = False,
        share: Engine | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Open `model` in `precision` ("bf16" or one of the model's 4-bit checkpoints).

        `activation` ("auto", "w4a4", "w4a8") is how 4-bit linears see their input; `attention` ("auto", "16bit",
        "8bit") is in how many bits a 4-bit FLUX holds attention's probabilities and values; `wide_weights` keeps 8-bit
        copies of 4-bit weights, for speed on Hopper. `vram_budget` is what all engines together keep to of a GPU, in
        GiB: networks come for their calls, a transformer block by block if need be; `offload` holds one network at a
        time. `share` is an engine of the same model whose text encoders and VAE are used again. `progress` is told in
        words what is being loaded.
        Raises ModelError, CheckpointError, BackendError or ArgumentError, each with one sentence saying what to do.
        """
        spec = resolve(model)
        if precision not in spec.precisions:
            raise ArgumentError(
                f"precision: expected one of {', '.join(spec.precisions)} for {spec.name}, got {precision!r}"
            )
        check_attention(attention)
        if share is not None and share.spec != spec:
            raise ArgumentError(f"share: expected an engine of {spec.name}, got one of {share.spec.name}")
        where = pick_device(device)
        room = _room(where, vram_budget, offload)
        home = where if room is None else torch.device("cpu")
        tell = progress or (lambda _: None)
        with loading.LOADING:
            if precision == "bf16":
                tell(f"loading the BF16 transformer of {spec.title}")
                transformer = loading.bf16_transformer(spec, home)
                backend, kind = "torch", "w16a16"
            else:
                tell(f"loading the {precision.upper()} transformer of {spec.title}")
                backend, kind = ops.backends.select(where).name, resolve_activation(activation, where)
                transformer = loading.quantized_transformer(spec, precision, backend, kind, home, tell)
                backend = _backend_of(transformer) or backend
            if attention != "auto":
                set_attention(transformer, attention)
            loading.add_lora(spec, transformer)
            if wide_weights:
                set_wide_weights(transformer, wide_weights)
            if share is None:
                tell(f"loading text encoders and VAE of {spec.title}")
            pipe = loading.pipeline(spec, transformer, where, share.pipe if share else None, home)
        engine = cls(spec, precision, kind, backend, where, pipe)
        if room is not None:
            room.seat(pipe)
        engine.wide_weights = wide_weights
        return engine

    @torch.inference_mode()
    def run(self, request: Request, on_step: OnStep | None = None, should_stop: ShouldStop | None = None) -> Result:
        """Make one picture. The noise depends on the seed and the size alone, so precisions can be compared.

        `on_step` hears of each finished step; `should_stop` is asked after each and ends the run with Cancelled.
        Raises RequestError naming the field that is wrong, CheckpointError or ModelError for a LoRA that cannot serve.
        """
        request = request.resolved(self.spec)
        self._wear(request.loras)
        self._warm_up(request)
        held = sum(module_bytes(part) for part in loading.parts(self.pipe).values())
        with PeakMeter(self.device, held) as memory:
            clock = _Clock(self.device)
            text = self.runner.encode(self.pipe, self.spec, request, self.device)
            clock.lap("encode")
            latents, paused = self._denoise(request, text, on_step, should_stop)
            clock.lap("denoise", paused)
            image = self.runner.decode(self.pipe, latents, request)
            clock.lap("decode")
        return Result(
            image=image,
            request=request,
            model=self.spec.name,
            precision=self.precision,
            activation=self.activation,
            attention=self._attention(request, text),
            wide_weights=self.wide_weights,
            backend=self.backend,
            device=_device_name(self.device),
            seconds=sum(clock.laps.values()),
            ms_per_step=1000 * clock.laps["denoise"] / (request.steps or 1),
            stages=clock.laps,
            weight_bytes=self.weight_bytes,
            peak_bytes=memory.bytes,
            versions=_versions(),
        )

    def _attention(self, request: Request, text: dict[str, torch.Tensor]) -> str | None:
        """What attention's probabilities and values are held in for this request; None where that is no question."""
        words = text.get("prompt_embeds")  # models of other families may have none
        picture = (request.width or 0) // 16 * ((request.height or 0) // 16)
        tokens = picture + (0 if words is None else words.shape[1])
        return attention_of(self.pipe.transformer, tokens, self.device)

    def _wear(self, wanted: Mapping[str, float]) -> None:
        """Bring the transformer's LoRAs to those of a request, beside the one that belongs to the model.

        Without any it is the transformer that was loaded, bit for bit; the same ones always come in the same order.
        """
        if wanted == self._worn and list(wanted) == list(self._worn):
            return
        from engine.lora import load_loras, set_lora_strengths, unload_lora

        if list(wanted) == list(self._worn):
            set_lora_strengths(self.pipe.transformer, wanted)
        else:
            for place in self._worn:
                unload_lora(self.pipe.transformer, place)
            self._worn = {}
            load_loras(self.pipe.transformer, [(place, strength, place) for place, strength in wanted.items()])
            if self.device.type == "cuda":
                self._warm.clear()  # what was recorded is gone
        self._worn = dict(wanted)

    def _warm_up(self, request: Request) -> None:
        """Run untimed steps at a size not seen before: first calls pay for kernel choice and allocation.

        On a CUDA device a second one is recorded (engine.graphs).
        """
        size = (request.width or 0, request.height or 0)
        if size in self._warm:
            return
        from dataclasses import replace

        once = replace(request, steps=1)
        text = self.runner.encode(self.pipe, self.spec, once, self.device)
        if self.device.type == "cuda":
            self._denoise(once, text, None, None)
        self.runner.decode(self.pipe, self._denoise(once, text, None, None)[0], once)
        self._warm.add(size)

    def _denoise(
        self,
        request: Request,
        text: dict[str, torch.Tensor],
        on_step: OnStep | None,
        should_stop: ShouldStop | None,
    ) -> tuple[torch.Tensor, float]:
        """Latents, and the seconds that previews took."""
        start = time.perf_counter()
        stopped = False
        watch = Watch(self.pipe, request) if on_step else None

        def after_step(pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal stopped
            if on_step:
                if watch is not None:
                    watch.saw(index, values.get("latents"))
                spent = time.perf_counter() - start - (watch.paused if watch else 0.0)
                on_step(Step(index + 1, request.steps or 0, spent, watch.picture if watch else None))
            if should_stop and should_stop():
                stopped = True
                pipe._interrupt = True
            return values

        latents = self.runner.denoise(self.pipe, self.spec, request, text, after_step)
        if stopped:
            raise Cancelled("the run was stopped")
        return latents, watch.paused if watch else 0.0


def _room(device: torch.device, vram_budget: float | None, offload: bool) -> Room | None:
    if vram_budget is None and not offload:
        return None
    if device.type != "cuda":
        name = "offload" if vram_budget is None else "vram_budget"
        raise ArgumentError(f"{name}: expected a model on a GPU, got one on {device.type}")
    return room_on(device, vram_budget)


def _backend_of(transformer: torch.nn.Module) -> str:
    """The backends that the 4-bit layers really have: what one cannot run is packed for the reference path."""
    return "+".join(sorted({layer.backend for layer in transformer.modules() if isinstance(layer, SVDQuantLinear)}))


class _Clock:
    """Seconds between laps, with the device's work finished at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.laps: dict[str, float] = {}
        self._last = self._now()

    def lap(self, name: str, without: float = 0.0) -> None:
        now = self._now()
        self.laps[name] = now - self._last - without
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _versions() -> dict[str, str]:
    from engine import __version__

    return {"nibble": __version__, "torch": torch.__version__, "diffusers": importlib.metadata.version("diffusers")}


if __name__ == "__main__":
    from engine.commands.generate import main

    raise SystemExit(main())
