"""A training step's forward and backward pass as one CUDA graph, with a way back.

A small model's step is hundreds of kernels that take microseconds each: launching them from Python takes longer than
running them. `Replayed` runs the first steps as they are, then records one and replays it from there on: one launch.
What must change from step to step travels in fixed tensors, so random numbers are drawn outside of the recording.
The optimizer and the all-reduce stay outside too: they are few launches, since everything is one flat buffer.

A recording is believed only once its gradients agree with an ordinary step's: on the batch it was made with, on the
next one, and again later, when weights have moved. Any doubt, and training goes on without it and says so.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from transformers.utils import import_utils

from zoo.train.dist import World

Tensors = dict[str, torch.Tensor]
Recorder = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""Records a call; returns what repeats it, and the tensors that it leaves its results in."""

_TOLERANCE = 0.05  # relative, of the whole gradient: 16-bit kernels add up in any order; a stale input is off by 1


@contextlib.contextmanager
def as_ever() -> Iterator[None]:
    """Within this context transformers does not notice that a step is recorded.

    It would build attention masks then that it leaves out otherwise, so that what is recorded would be neither what was
    compiled nor what is checked. No value of a mask is needed here: prompts are padded and not masked.
    """
    kept = getattr(import_utils, "is_cuda_stream_capturing", None)
    if kept is None:
        yield
        return
    import_utils.is_cuda_stream_capturing = lambda: False
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = kept


def record(call: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
    """The recorder for CUDA. Runs in the current stream, which must not be the default one."""
    graph = torch.cuda.CUDAGraph()
    gc.collect()
    torch.cuda.synchronize()
    gc.disable()  # nothing that belongs to another graph may be freed meanwhile
    try:
        # thread_local: NCCL's watchdog thread may ask after its own events while this one records.
        with as_ever(), torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            results = call()
    finally:
        gc.enable()
    return graph.replay, results


def _forget_recording(device: torch.device) -> None:
    """Give a CUDA device a fresh random generator: after a recording that failed its own still waits for the end."""
    if device.type != "cuda":
        return
    torch.cuda.init()
    kept = torch.cuda.default_generators[device.index or 0]
    kept.graphsafe_set_state(torch.Generator(device).manual_seed(kept.initial_seed()).graphsafe_get_state())


@contextlib.contextmanager
def own_stream(world: World) -> Iterator[None]:
    """All work within this context goes to one stream that can be recorded. On the CPU it does nothing."""
    if not world.cuda:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.synchronize()


class Replayed:
    """Calls `work(inputs)`, which adds a gradient into `grad` and returns 0-d results; records it after a while.

    work: takes tensors whose names, shapes and kinds never change; uses no random numbers and asks for no value.
    grad: the flat gradient; it is set to zero here before each call. `active` tells whether replays are in use.
    """

    def __init__(self, work: Callable[[Tensors], Tensors], grad: torch.Tensor, enabled: bool,
                 recorder: Recorder = record, *, after: int = 5,
                 checks: tuple[int, ...] = (0, 1, 50, 400)) -> None:  # fmt: skip
        self.work, self.grad, self.recorder, self.after, self.checks = work, grad, recorder, after, checks
        self.enabled, self.calls = enabled, 0
        self.inputs: Tensors = {}
        self.results: Tensors = {}
        self.replay: Callable[[], None] | None = None

    @property
    def active(self) -> bool:
        return self.replay is not None

    def __call__(self, inputs: Tensors) -> Tensors:
        self.calls += 1
        if self.enabled and self.calls == self.after + 1:
            self._record(inputs)
        if not self.active:
            return self._plain(inputs)
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        since = self.calls - self.after - 1
        if since in self.checks and not self._agrees():
            return self._plain(inputs)
        self.replay()
        return {name: value.clone() for name, value in self.results.items()}  # the next replay writes over them

    def release(self, why: str) -> None:
        """Go on without the recording."""
        if self.enabled:
            print(f"warning: going on without a recorded step: {why}", flush=True)
        self.enabled, self.replay, self.results, self.inputs = False, None, {}, {}

    def _plain(self, inputs: Tensors) -> Tensors:
        self.grad.zero_()
        return self.work(inputs)

    def _record(self, inputs: Tensors) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        try:
            self.replay, self.results = self.recorder(lambda: self._plain(self.inputs))
        except Exception as error:
            self.release(f"recording failed: {type(error).__name__}: {error}")
            _forget_recording(self.grad.device)

    def _agrees(self) -> bool:
        """Whether a replay gives what an ordinary step gives for the same inputs. Waits for the device."""
        try:
            self.replay()
            found, results = self.grad.clone(), {name: float(value) for name, value in self.results.items()}
            wanted = {name: float(value) for name, value in self._plain(self.inputs).items()}
            gap = float((found - self.grad).norm() / self.grad.norm().clamp(min=1e-30))
        except Exception as error:
            self.release(f"the check failed: {type(error).__name__}: {error}")
            return False
        near = lambda a, b: abs(a - b) <= _TOLERANCE * abs(b) + 1e-6  # noqa: E731
        far = [name for name in wanted if not near(results[name], wanted[name])]
        if gap <= _TOLERANCE and not far:  # a NaN is not <= anything
            print(f"recorded step checked: its gradient is {gap:.1e} off an ordinary one's", flush=True)
            return True
        self.release(f"its gradient is {gap:.3g} off an ordinary step's; {far or 'losses agree'}")
        return False


class ByShape:
    """A `Replayed` for each set of shapes that the inputs come in; arguments and use are the same."""

    def __init__(self, work: Callable[[Tensors], Tensors], grad: torch.Tensor, enabled: bool,
                 recorder: Recorder = record) -> None:  # fmt: skip
        self.make = lambda: Replayed(work, grad, enabled, recorder)
        self.steps: dict[tuple, Replayed] = {}

    @property
    def active(self) -> bool:
        return bool(self.steps) and all(step.active for step in self.steps.values())

    def __call__(self, inputs: Tensors) -> Tensors:
        shapes = tuple((name, value.shape) for name, value in inputs.items())
        if shapes not in self.steps:
            self.steps[shapes] = self.make()
        return self.steps[shapes](inputs)

    def release(self, why: str) -> None:
        """Go on without recordings."""
        for step in self.steps.values():
            step.release(why)
