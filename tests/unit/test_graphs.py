"""Recording where there is no CUDA device: calls go through, and nothing else changes. tests/gpu has the rest."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from engine.graphs import Recorder, forget, record, unrecorded


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> tuple[Tensor]:
        """x (3) -> (3)."""
        return (x * self.weight + shift,)


def test_calls_on_a_cpu_go_through():
    model = Doubled()
    recorder = record(model)
    for _ in range(3):
        assert model(torch.ones(3), shift=1.0)[0].tolist() == [3, 3, 3]
    assert recorder.recordings == 0
    assert not recorder.refused


def test_a_model_keeps_its_recorder_and_its_signature():
    model = Doubled()
    recorder = record(model)
    assert isinstance(recorder, Recorder)
    assert record(model) is recorder
    assert list(inspect.signature(model.forward).parameters) == ["x", "shift"]
    assert list(model.state_dict()) == ["weight"]


def test_forgetting_what_was_never_recorded():
    model = Doubled()
    forget(model)
    record(model)
    forget(model)
    assert model(torch.zeros(3))[0].tolist() == [0, 0, 0]


def test_nothing_is_recorded_while_hooks_are_there(monkeypatch: pytest.MonkeyPatch):
    model, forgot = Doubled(), []
    with unrecorded(model):  # without a recorder
        model(torch.zeros(3))
    recorder = record(model)
    monkeypatch.setattr(recorder, "_key", lambda *_: forgot.append("asked"))
    monkeypatch.setattr(recorder, "forget", lambda: forgot.append("forgot"))
    with unrecorded(model):
        model(torch.zeros(3))
        assert forgot == ["forgot"]
    model(torch.zeros(3))
    assert forgot == ["forgot", "asked"]
