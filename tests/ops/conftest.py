from __future__ import annotations

import pytest
import torch

from engine import ops

BACKENDS = ops.backends.NAMES


def reason_not_to_run(name: str) -> str | None:
    if name == "reference":
        return None
    for known, runs, why in ops.backends.cpu_kernels().instruction_sets():
        if known == name:
            return None if runs else why
    return "unknown to the compiled module"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; those that this machine lacks are skipped with the reason the engine gives."""
    why = reason_not_to_run(request.param)
    if why is not None:
        pytest.skip(f"{request.param}: {why}")
    return request.param


@pytest.fixture
def poisoned():
    """torch.empty gives NaN, and 127 for integers: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads():
    """Sets torch's thread count for a test, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
