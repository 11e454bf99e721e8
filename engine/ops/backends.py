"""Which kernels run here: one ordered table a device, best first, and the choice.

The only file that imports engine.kernels. The choice is made once a device and kept; ENGINE_BACKEND forces one. What
was not tested on a device's kind is asked to check itself there first (engine/ops/self_check.py).
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from engine.errors import BackendError

__all__ = [
    "CUDA_NAMES",
    "NAMES",
    "BackendInfo",
    "TableRow",
    "available",
    "cpu_kernels",
    "cuda_kernels",
    "isa_index",
    "modes",
    "objection",
    "select",
    "table",
    "takes_kernels",
]

# Best first.
_CPU = ("amx", "avx512", "avx2", "scalar")
# Three more can be packed for but are never chosen: AVX-512 as it runs on processors without its BF16 instructions, AMX
# that keeps group scales for any number of tokens, and AMX on emulated tiles. Tests and comparisons use them.
NAMES = (*_CPU, "reference", "avx512_without_bf16", "amx_grouped", "amx_emulated")
# Compiled for CUDA devices, best first. The first two passed their tests on Hopper; sm80 has not run on any other card,
# so there it is taken once it has passed its self-check. sm120a has never run: it stands behind `reference` in the
# table, and is taken only where ENGINE_BACKEND names it.
CUDA_NAMES = ("sm90a", "sm80", "sm120a")
_CAPABILITY = {"sm90a": (9, 0), "sm80": (8, 0), "sm120a": (12, 0)}
_MODES = {"sm90a": ("fp8",), "sm120a": ("nvfp4",)}
_INTEGER_MODES = ("int8", "int4", "uint4")


class BackendInfo(NamedTuple):
    """A backend that runs on `device`, and why it was chosen."""

    name: str
    device: torch.device
    reason: str


class TableRow(NamedTuple):
    """One backend of a device: whether it runs here, and if not, why."""

    name: str
    runs: bool
    why: str


@lru_cache(maxsize=1)
def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        from engine.kernels import _cpu
    except ImportError as error:
        return None, f"the compiled module engine.kernels._cpu cannot be loaded: {error}"
    return _cpu, ""


def cpu_kernels() -> ModuleType:
    """The compiled CPU module. Raises BackendError where it is missing."""
    module, why = _load_cpu()
    if module is None:
        raise BackendError(f"{why}. Build it with `pip install -e .`.")
    return module


def modes(backend: str) -> tuple[str, ...]:
    """Activation modes that the kernels of a compiled backend offer."""
    return _MODES.get(backend, _INTEGER_MODES)


def cuda_kernels() -> ModuleType | None:
    """The compiled CUDA module, or None where it was not built. Loads without a driver."""
    try:
        from engine.kernels import _cuda
    except ImportError:
        return None
    return _cuda


@lru_cache(maxsize=16)
def isa_index(name: str) -> int:
    """The compiled module's number for instruction set `name`. Raises BackendError if that cannot run here."""
    for index, (known, runs, why) in enumerate(cpu_kernels().instruction_sets()):
        if known == name:
            if not runs:
                raise BackendError(f"backend {name} cannot run here: {why}")
            return index
    raise BackendError(f"backend {name} has no CPU kernels")


def table(device: torch.device | str) -> tuple[TableRow, ...]:
    """Every backend that could serve `device`, best first. Asks the processor; launches nothing."""
    rows = []
    if torch.device(device).type == "cpu":
        module, missing = _load_cpu()
        known = {} if module is None else {name: (runs, why) for name, runs, why in module.instruction_sets()}
        rows = [TableRow(name, *known.get(name, (False, missing))) for name in _CPU]
        return (*rows, TableRow("reference", True, ""))
    *tested, forced = (_cuda_row(name, torch.device(device)) for name in CUDA_NAMES)
    return (*tested, TableRow("reference", True, ""), forced)


def _cuda_row(name: str, device: torch.device) -> TableRow:
    if cuda_kernels() is None:
        return TableRow(name, False, "the CUDA kernels are not built (no nvcc was found at installation)")
    if not torch.cuda.is_available():
        return TableRow(name, False, "torch sees no CUDA device")
    found, wanted = torch.cuda.get_device_capability(device), _CAPABILITY[name]
    runs = found >= wanted if name == "sm80" else found == wanted
    said = f"made for compute capability {wanted[0]}.{wanted[1]}, this device has {found[0]}.{found[1]}"
    return TableRow(name, runs, "" if runs else said)


def available(device: torch.device | str) -> tuple[BackendInfo, ...]:
    """The backends that run on `device`, best first."""
    where = torch.device(device)
    return tuple(BackendInfo(row.name, where, "runs here") for row in table(where) if row.runs)


def select(device: torch.device | str) -> BackendInfo:
    """The backend for `device`: the first that runs and has no `objection`, or the one ENGINE_BACKEND names, unchecked.

    Raises BackendError if the named one is unknown or cannot run here. Warns once when only `reference` is left.
    """
    return _select(torch.device(device), os.environ.get("ENGINE_BACKEND", ""))


@lru_cache(maxsize=64)
def _select(device: torch.device, forced: str) -> BackendInfo:
    rows = table(device)
    if forced:
        row = next((row for row in rows if row.name == forced), None)
        if row is None:
            known = ", ".join(row.name for row in rows)
            raise BackendError(f"ENGINE_BACKEND={forced}: expected one of {known} on {device}")
        if not row.runs:
            raise BackendError(f"ENGINE_BACKEND={forced} cannot run on {device}: {row.why}")
        return BackendInfo(forced, device, "forced by ENGINE_BACKEND")
    best, passed = TableRow("reference", True, ""), []
    for row in rows:
        if not (why := row.why or objection(row.name, device)):
            best = row
            break
        passed.append(f"{row.name}: {why}")
    if best.name == "reference":
        why = "; ".join(passed) or f"there are no compiled kernels for {device.type} yet"
        warnings.warn(f"running on the slow reference backend ({why})", RuntimeWarning, stacklevel=3)
        return BackendInfo("reference", device, why)
    return BackendInfo(
        best.name, device, f"the best that runs here ({'; '.join(passed)})" if passed else "the best there is"
    )


def takes_kernels(device: torch.device) -> bool:
    """Whether the passes between linears, which are compiled beside sm80's kernels, may run on a CUDA device."""
    return cuda_kernels() is not None and select(device).name in CUDA_NAMES


def objection(name: str, device: torch.device) -> str:
    """Why a backend that could run on `device` is not taken there unless it is named: sm80 failed its self-check.

    Raises BackendError where that has not run yet and a CUDA graph is being recorded.
    """
    if name != "sm80":
        return ""
    return _check_sm80(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _check_sm80(index: int) -> str:
    from engine.ops.self_check import failure  # it calls the ops, which need this module

    if torch.cuda.is_current_stream_capturing():
        raise BackendError(f"the backend of cuda:{index} is chosen before a CUDA graph is recorded, not meanwhile")
    return failure(torch.device("cuda", index), "sm80")
