"""Recorded steps: believed only while they agree with ordinary ones, and nothing is lost when they do not."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.train.replay import ByShape, Replayed, as_ever


class Toy:
    """A step with one weight: the gradient is 2 w x, summed over the batch."""

    def __init__(self) -> None:
        self.weight, self.grad, self.ran = torch.tensor([3.0]), torch.zeros(1), 0

    def work(self, b):
        self.ran += 1
        self.grad += (2 * self.weight * b["x"]).sum()
        return {"loss": (self.weight * b["x"]).square().mean()}

    def recorder(self, call):
        """Repeats a call on the fixed inputs, as a graph would."""
        results = {name: value.clone() for name, value in call().items()}

        def replay():
            for name, value in call().items():
                results[name].copy_(value)

        return replay, results


def batches(count):
    return [{"x": torch.tensor([1.0, 2.0]) + i} for i in range(count)]


def run(toy, recorder, count=8, enabled=True):
    step = Replayed(toy.work, toy.grad, enabled, recorder, after=2, checks=(0, 1, 4))
    seen = []
    for b in batches(count):
        loss = step(b)["loss"]
        wanted = float((toy.weight * b["x"]).square().mean()), float((2 * toy.weight * b["x"]).sum())
        seen.append((float(loss), float(toy.grad)) == pytest.approx(wanted))
        toy.weight += 1.0
    return step, seen


def test_replays_take_new_inputs_and_live_weights():
    toy = Toy()
    step, seen = run(toy, toy.recorder)
    assert step.active
    assert all(seen)


def test_results_outlive_the_next_replay():
    toy = Toy()
    step = Replayed(toy.work, toy.grad, True, toy.recorder, after=0, checks=())
    first, second = (step(b)["loss"] for b in batches(2))
    assert float(first) != float(second)


def test_inputs_of_another_shape_get_a_recording_of_their_own():
    toy = Toy()
    step = ByShape(toy.work, toy.grad, True, toy.recorder)
    for count in range(12):
        b = {"x": torch.arange(2.0 + 2 * (count % 2)) + count}
        loss = step(b)["loss"]
        assert float(loss) == pytest.approx(float((toy.weight * b["x"]).square().mean()))
        assert step.active == (count >= 11)  # five ordinary steps of each shape come first
    assert len(step.steps) == 2
    step.release("enough")
    assert not step.active


def test_off_means_ordinary_steps():
    toy = Toy()
    step, seen = run(toy, toy.recorder, enabled=False)
    assert not step.active
    assert all(seen)
    assert toy.ran == len(seen)


def stale_inputs(toy, call):
    """A recording that has its first inputs built in."""
    results = {name: value.clone() for name, value in call().items()}
    grad = toy.grad.clone()
    return (lambda: toy.grad.copy_(grad)), results


def stale_weights(toy, call):
    """A recording that follows its inputs, with the weights of the day it was made."""
    weight = toy.weight.clone()
    results = {name: value.clone() for name, value in call().items()}

    def replay():
        now, toy.weight = toy.weight, weight
        for name, value in call().items():
            results[name].copy_(value)
        toy.weight = now

    return replay, results


def not_finite(toy, call):
    results = {name: value.clone() for name, value in call().items()}
    return (lambda: toy.grad.fill_(math.nan)), results


def impossible(toy, call):
    raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize("broken", [stale_inputs, stale_weights, not_finite, impossible])
def test_a_broken_recording_is_dropped_before_it_trains_anything(broken, capsys):
    toy = Toy()
    step, seen = run(toy, lambda call: broken(toy, call))
    assert not step.active
    assert all(seen)
    assert "warning: going on without a recorded step" in capsys.readouterr().out


def test_text_encoders_work_as_ever_while_a_step_is_recorded(monkeypatch):
    """transformers would build other masks then than it built while the layers were compiled."""
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    assert import_utils.is_tracing()
    with as_ever():
        assert not import_utils.is_tracing()
    assert import_utils.is_tracing()
