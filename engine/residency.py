"""Networks that share a device too small for all of them: each comes when it is called, and others go to make room.

    room = room_on(torch.device("cuda:0"), gib=16)      # one a device, for all models of the process
    room.seat(pipe)                                      # whose networks lie on the host: each comes for its calls

Weights do not change while they are away, so coming home costs nothing: the host keeps its copy, in pinned memory.
What changes them (engine.lora) sends for them first, by `go_home`. Small tensors are slices of a LoRA's tables, so it
is those very slices that they come home to.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from engine import graphs
from engine.errors import ArgumentError

__all__ = ["Room", "go_home", "room_on"]

GIB = 2**30
RESERVE = 2.5  # GiB beside weights that a picture of 1024x1024 takes at its highest point (the VAE: 2.1 measured)
_SMALL = 2**20  # bytes of a tensor up to which its host copy is not moved to pinned memory


class Room:
    """The memory of one device that networks share; `budget` in bytes, or None to hold one network at a time."""

    def __init__(self, device: torch.device, budget: int | None) -> None:
        self.device, self.budget = device, budget
        self._here: OrderedDict[Unit, None] = OrderedDict()  # least recently used first
        self._known: WeakSet[nn.Module] = WeakSet()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.most = 0  # bytes of weights that were here at once

    @property
    def held(self) -> int:
        """Bytes of weights that are here now."""
        return sum(unit.bytes for unit in self._here)

    @property
    def free(self) -> int:
        """Bytes of weights that may be here at once."""
        return 2**62 if self.budget is None else self.budget - int(RESERVE * GIB)

    def seat(self, pipe: Any) -> None:
        """Admit all networks of a pipeline, and of its prior; it goes on to take this device for its own."""
        from engine.models.loading import parts

        for part in parts(pipe).values():
            (self.admit_transformer if part is pipe.transformer else self.admit)(part)
        for one in filter(None, (pipe, getattr(pipe, "prior", None))):
            if not isinstance(one, _Seated):
                one.__class__ = type(type(one).__name__, (_Seated, type(one)), {})
            one._seat = self.device

    def admit(self, module: nn.Module) -> None:
        """Let a network, which lies on the host, come when it or one of its children is called.

        Raises ArgumentError where it is larger than the budget.
        """
        if module in self._known:
            return
        unit = Unit(module, [module])
        self._check(unit.bytes, type(module).__name__)
        self._known.add(module)
        for part in (module, *module.children()):
            part.register_forward_pre_hook(_Caller(self, unit), with_kwargs=True, prepend=True)

    def admit_transformer(self, model: nn.Module) -> None:
        """The same; a model that is larger than the budget comes block by block, the next one while one is at work."""
        if model in self._known:
            return
        blocks = [block for part in model.children() if isinstance(part, nn.ModuleList) for block in part]
        whole = Unit(model, [model])
        if whole.bytes <= self.free or not blocks:
            self.admit(model)
            return
        within = {module for block in blocks for module in block.modules()}
        rest = [module for module in model.modules() if module not in within]
        base, units = Unit(model, rest, deep=False), [Unit(model, [block]) for block in blocks]
        largest = max(unit.bytes for unit in units)
        self._check(base.bytes + 2 * largest, f"two blocks of {type(model).__name__}")
        graphs.record(model).paused = True
        model.register_forward_pre_hook(_Caller(self, base), with_kwargs=True, prepend=True)
        left = self.free - base.bytes - 2 * largest
        passing: list[Unit] = []
        for block, unit in zip(blocks, units, strict=True):
            left -= unit.bytes
            if left < 0:  # the first ones stay, the others pass
                passing.append(unit)
                block.register_forward_hook(_Leaver(self, unit))
            block.register_forward_pre_hook(_Caller(self, unit, passing), with_kwargs=True, prepend=True)
        self._known.add(model)

    def bring(self, unit: Unit, ahead: bool = False) -> None:
        """Have a unit here, after sending away what is in its way; `ahead`: on its way, if there is room."""
        if unit in self._here:
            self._here.move_to_end(unit)
            return
        unit.measure()
        others = self._in_the_way(unit)
        if ahead and others:
            return
        for other in others:
            self.send(other)
        unit.come(self.device, self._stream if ahead else None)
        self._here[unit] = None
        self.most = max(self.most, self.held)

    def send(self, unit: Unit) -> None:
        """Send a unit back to the host."""
        if unit in self._here:
            del self._here[unit]
            unit.go()

    def send_all(self, owner: nn.Module) -> None:
        """Send a network home, all of it."""
        for unit in [unit for unit in self._here if unit.owner is owner]:
            self.send(unit)

    def _in_the_way(self, unit: Unit) -> list[Unit]:
        if self.budget is None:
            return [other for other in self._here if other.owner is not unit.owner]
        needed, found = self.held + unit.bytes - self.free, []
        for other in self._here:
            if needed <= 0:
                break
            found.append(other)
            needed -= other.bytes
        return found

    def _check(self, wanted: int, name: str) -> None:
        if wanted > self.free:
            least = wanted / GIB + RESERVE
            told = f"at least {least:.1f} for {name}, which takes {wanted / GIB:.1f} beside {RESERVE} to work in"
            raise ArgumentError(f"vram_budget: expected {told}, got {(self.budget or 0) / GIB:.1f}")


class _Seated:
    """A pipeline that asks none of its networks where it is."""

    _seat: torch.device

    @property
    def device(self) -> torch.device:
        return self._seat

    @property
    def _execution_device(self) -> torch.device:
        return self._seat


class Unit:
    """Tensors that come and go together: those of `modules`, of the network `owner`."""

    def __init__(self, owner: nn.Module, modules: Iterable[nn.Module], deep: bool = True) -> None:
        self.owner, self._modules, self._deep = owner, list(modules), deep
        self.bytes = 0
        self.measure()
        self._host: dict[int, tuple[Tensor, Tensor]] = {}  # each tensor and its copy on the host
        self._arrived: Any = None

    def measure(self) -> None:
        """Take note of its size, which a LoRA changes."""
        self.bytes = sum(tensor.nbytes for tensor in self._tensors())

    def come(self, device: torch.device, stream: Any) -> None:
        """Copy to the device; on `stream`, if one is given, beside what runs."""
        graphs.forget(self.owner)
        with torch.cuda.stream(stream):  # None: as it is
            for tensor in self._tensors():
                with _as_it_was_made(tensor):
                    pin = device.type == "cuda" and tensor.nbytes > _SMALL
                    host = _pinned(tensor.data) if pin else tensor.data
                    self._host[id(tensor)] = tensor, host
                    tensor.data = host.to(device, non_blocking=True, copy=True)
            self._arrived = stream.record_event() if stream is not None else None

    def arrive(self) -> None:
        """Let what follows wait for a copy that is under way, and keep its memory from others until that is done."""
        if self._arrived is None:
            return
        current = torch.cuda.current_stream()
        current.wait_event(self._arrived)
        for tensor, _ in self._host.values():
            tensor.data.record_stream(current)
        self._arrived = None

    def go(self) -> None:
        """Back to the host's copy."""
        self.arrive()
        graphs.forget(self.owner)
        for tensor in self._tensors():
            _, host = self._host.get(id(tensor), (tensor, None))
            with _as_it_was_made(tensor):
                tensor.data = tensor.data.cpu() if host is None else host
        self._host.clear()

    def _tensors(self) -> list[Tensor]:
        """Parameters, buffers and tensors that a module holds besides (a LoRA's), each once."""
        modules = [part for module in self._modules for part in (module.modules() if self._deep else (module,))]
        found: dict[int, Tensor] = {}
        for module in modules:
            held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
            for value in held:
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor):
                        found[id(tensor)] = tensor
        return list(found.values())


class _Caller:
    """Before a module's call: its unit comes, the next one of those that pass is sent for, its inputs move along."""

    def __init__(self, room: Room, unit: Unit, passing: Sequence[Unit] = ()) -> None:
        self._room, self._unit, self._passing = room, unit, passing

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._room.bring(self._unit)
        self._unit.arrive()
        if self._passing:
            after = self._passing.index(self._unit) + 1 if self._unit in self._passing else 0
            self._room.bring(self._passing[after % len(self._passing)], ahead=True)
        move = lambda value: value.to(self._room.device) if isinstance(value, Tensor) else value  # noqa: E731
        return tuple(move(value) for value in args), {name: move(value) for name, value in kwargs.items()}


class _Leaver:
    """After a block's call: it goes again."""

    def __init__(self, room: Room, unit: Unit) -> None:
        self._room, self._unit = room, unit

    def __call__(self, *_: Any) -> None:
        self._room.send(self._unit)


@contextlib.contextmanager
def _as_it_was_made(tensor: Tensor) -> Iterator[None]:
    """In inference mode where the tensor is of that: it can hold no other data, and others not its."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def _pinned(host: Tensor) -> Tensor:
    try:
        return host if host.is_pinned() else host.pin_memory()
    except RuntimeError:  # no more memory can be locked
        return host


_rooms: dict[torch.device, Room] = {}


def go_home(model: nn.Module) -> None:
    """Send a network home from wherever it is, before something in it is changed."""
    for room in _rooms.values():
        room.send_all(model)


def room_on(device: torch.device, gib: float | None) -> Room:
    """The room of a device, the same for all models of the process; `gib` None holds one network at a time.

    With a budget torch's allocator refuses what is above it. Raises ArgumentError for a budget that is no more than
    what a picture takes beside weights, or another than the device has already.
    """
    budget = None if gib is None else int(gib * GIB)
    if budget is not None and budget <= RESERVE * GIB:
        raise ArgumentError(f"vram_budget: expected more than {RESERVE} GiB, got {gib}")
    if device.type == "cuda" and device.index is None:  # "cuda" and "cuda:0" are one room
        device = torch.device("cuda", torch.cuda.current_device())
    found = _rooms.get(device)
    if found is None:
        found = _rooms[device] = Room(device, budget)
        if device.type == "cuda" and budget is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), device)
    if found.budget != budget:
        raise ArgumentError(f"vram_budget: expected the {(found.budget or 0) / GIB:g} GiB of before, got {gib}")
    return found
