"""The choice of a backend: the table, the order, ENGINE_BACKEND, a missing compiled module."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from engine import doctor, ops
from engine.errors import BackendError
from engine.ops import backends, self_check
from tests.ops.cases import Case, random_linear


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Forget choices made before, and after."""
    monkeypatch.delenv("ENGINE_BACKEND", raising=False)
    caches = (backends._load_cpu, backends._select, backends._check_sm80, backends.isa_index)
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


@pytest.fixture
def card(fresh):
    """A device that torch knows nothing of here: one of Ada's, unless a test says otherwise."""
    fresh.setattr(backends, "cuda_kernels", lambda: sys)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    fresh.setattr(torch.cuda, "current_device", lambda: 0)
    fresh.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return fresh


def test_other_cards_take_sm80_after_one_check_each(card):
    asked: list[str] = []
    card.setattr(self_check, "failure", lambda device, backend: asked.append(f"{backend} on {device}") or "")
    assert [row.name for row in backends.table("cuda:0")] == ["sm90a", "sm80", "reference", "sm120a"]
    assert {backends.select(device).name for device in ("cuda:0", "cuda", "cuda:0")} == {"sm80"}
    assert backends.select("cuda:1").name == "sm80"
    assert asked == ["sm80 on cuda:0", "sm80 on cuda:1"]


def test_an_rtx_50_takes_sm80_too_and_what_never_ran_only_by_name(card):
    card.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    card.setattr(self_check, "failure", lambda device, backend: "it failed" if device.index else "")
    assert backends.select("cuda:0").name == "sm80"
    with pytest.warns(RuntimeWarning, match="sm80: it failed"):
        assert backends.select("cuda:1").name == "reference"
    card.setattr(self_check, "failure", lambda device, backend: pytest.fail("was checked"))
    card.setenv("ENGINE_BACKEND", "sm120a")
    assert backends.select("cuda:2").name == "sm120a"


def test_a_failed_check_leaves_the_reference_with_one_warning(card):
    card.setattr(self_check, "failure", lambda device, backend: "its self-check gave wrong results (int4)")
    with pytest.warns(
        RuntimeWarning, match=r"slow reference backend \(.*; sm80: its self-check gave wrong .*\)"
    ) as seen:
        assert backends.select("cuda:0").name == "reference"
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select("cuda:0").name == "reference"
    card.setenv("ENGINE_BACKEND", "sm80")
    assert backends.select("cuda:0").name == "sm80"


def test_hopper_and_what_is_older_are_not_checked(card):
    card.setattr(self_check, "failure", lambda device, backend: pytest.fail("was checked"))
    card.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backends.select("cuda:0").name == "sm90a"
    card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"made for compute capability 8\.0, this device has 7\.5"):
        assert backends.select("cuda:1").name == "reference"


def test_no_check_while_a_graph_is_recorded(card):
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(BackendError, match="cuda:0 is chosen before a CUDA graph is recorded"):
        backends.select("cuda:0")
    card.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    card.setattr(self_check, "failure", lambda device, backend: "")
    assert backends.select("cuda:0").name == "sm80"


def test_the_doctor_tells_of_a_failed_check(card):
    card.setattr(self_check, "failure", lambda device, backend: "its self-check gave wrong results (int4)")
    card.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    card.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=8 << 30))
    report = doctor._device(torch.device("cuda", 0), backends)
    rows = {row["name"]: row for row in report["backends"]}
    assert report["chosen"] == "reference"
    assert not rows["sm80"]["runs"]
    assert "wrong results" in rows["sm80"]["why"]


def test_the_self_check_passes_where_kernels_are_right():
    assert self_check.failure(torch.device("cpu"), "scalar") == ""


def test_the_self_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch):
    right = ops.svdq_linear

    def wrong(x: torch.Tensor, packed: ops.PackedLinear, mode: str, gelu: bool = False) -> torch.Tensor:
        return right(x, packed, mode, gelu).roll(int(mode == "int4"), 1)

    monkeypatch.setattr(ops, "svdq_linear", wrong)
    assert self_check.failure(torch.device("cpu"), "scalar") == "its self-check gave wrong results (int4)"
    monkeypatch.setattr(ops, "awq_linear", lambda x, packed: torch.full((5, packed.n), torch.nan))
    assert self_check.failure(torch.device("cpu"), "scalar").endswith("(int4, weight-only)")

    def fails(x: torch.Tensor, packed: ops.PackedLinear, mode: str) -> torch.Tensor:
        raise BackendError("a CUDA kernel could not run: no kernel image is available\nand more")

    monkeypatch.setattr(ops, "svdq_linear", fails)
    said = self_check.failure(torch.device("cpu"), "scalar")
    assert said == "its self-check could not run (a CUDA kernel could not run: no kernel image is available)"


@pytest.mark.parametrize("part", ["gelu", "added"])
def test_the_self_check_sees_what_follows_a_product(part: str, monkeypatch: pytest.MonkeyPatch):
    right = ops.svdq_linear
    if part == "gelu":
        monkeypatch.setattr(ops, "svdq_linear", lambda x, packed, mode, gelu=False: right(x, packed, mode))
    else:
        monkeypatch.setattr(ops, "add_linear_", lambda x, *_: x.mul_(1.1))
    assert self_check.failure(torch.device("cpu"), "scalar") == "its self-check gave wrong results (int8, int4, uint4)"


def test_the_self_check_is_of_kernels_not_of_the_moment(monkeypatch: pytest.MonkeyPatch):
    with torch.device("meta"):
        assert self_check.failure(torch.device("cpu"), "scalar") == ""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "add_linear_", full)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.failure(torch.device("cpu"), "scalar")


def test_importing_touches_no_gpu_and_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error', RuntimeWarning); import torch, engine.ops; " \
           "assert not torch.cuda.is_initialized()"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
