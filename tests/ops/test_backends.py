"""The choice of a backend: the table, the order, ENGINE_BACKEND, a missing compiled module."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings

import pytest
import torch

from engine import ops
from engine.errors import BackendError
from engine.ops import backends
from tests.ops.cases import Case, random_linear


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Forget choices made before, and after."""
    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    caches = (backends._load_cpu, backends._select, backends.isa_index)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_table_lists_every_backend_in_order_with_a_reason(fresh):
    rows = backends.table("cpu")
    assert [row.name for row in rows] == ["amx", "avx512", "avx2", "scalar", "reference"]
    assert all(row.runs == (row.why == "") for row in rows)
    assert rows[-1].runs
    assert rows[-2].runs


def test_select_takes_the_first_that_runs(fresh):
    best = next(row.name for row in backends.table("cpu") if row.runs)
    chosen = backends.select(torch.device("cpu"))
    assert (chosen.name, chosen.device.type) == (best, "cpu")
    assert chosen.reason
    assert [info.name for info in backends.available("cpu")] == [row.name for row in backends.table("cpu") if row.runs]


@pytest.mark.parametrize("name", ["scalar", "reference"])
def test_engine_backend_forces(fresh, name: str):
    fresh.setenv("ENGINE_BACKEND", name)
    assert backends.select("cpu").name == name
    fresh.delenv("ENGINE_BACKEND")
    assert backends.select("cpu").name == next(row.name for row in backends.table("cpu") if row.runs)


@pytest.mark.parametrize(("name", "words"), [
    ("neon", "ENGINE_BACKEND=neon: expected one of amx, avx512, avx2, scalar, reference on cpu"),
    ("amx_emulated", "expected one of"),
])  # fmt: skip
def test_unknown_backend_is_refused(fresh, name: str, words: str):
    fresh.setenv("ENGINE_BACKEND", name)
    with pytest.raises(BackendError, match=words):
        backends.select("cpu")


def test_backend_that_cannot_run_is_refused_with_its_reason(fresh):
    row = next((row for row in backends.table("cpu") if not row.runs), None)
    if row is None:
        pytest.skip("every backend runs on this machine")
    fresh.setenv("ENGINE_BACKEND", row.name)
    with pytest.raises(BackendError, match=re.escape(f"ENGINE_BACKEND={row.name} cannot run on cpu: {row.why}")):
        backends.select("cpu")
    packed = ops.pack(random_linear(Case(1, 16, 64, 0)), row.name)
    with pytest.raises(BackendError, match=re.escape(f"backend {row.name} cannot run here: {row.why}")):
        ops.svdq_linear(torch.zeros(1, 64), packed, "int8")


def test_without_the_compiled_module_the_reference_runs_and_warns_once(fresh):
    fresh.setitem(sys.modules, "engine.kernels._cpu", None)
    fresh.delattr("engine.kernels._cpu", raising=False)
    with pytest.warns(RuntimeWarning, match=r"slow reference backend .*engine.kernels._cpu cannot be loaded"):
        assert backends.select("cpu").name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cpu").name == "reference"
    packed = ops.pack(random_linear(Case(1, 16, 64, 16)), "reference")
    assert ops.svdq_linear(torch.ones(1, 64), packed, "int8").isfinite().all()
    with pytest.raises(BackendError, match="pip install -e"):
        backends.cpu_kernels()


def test_importing_touches_no_gpu_and_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error', RuntimeWarning); import torch, engine.ops; " \
           "assert not torch.cuda.is_initialized()"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
