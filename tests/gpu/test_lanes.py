"""What a recorded step does side by side and ahead of time gives the bits of a plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.random_models import quantized
from engine.graphs import record
from engine.lanes import Lane
from engine.ops import widening
from tests.models.conftest import CONFIG, flux_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs Hopper"
    ),
]


def model() -> Any:
    return quantized("cuda", CONFIG | {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}, "auto", 16)


def inputs(seed: int, text: int) -> dict[str, Any]:
    made = flux_inputs(tokens=1201, text=text, seed=seed)
    return {name: value.cuda() for name, value in made.items()} | {"return_dict": False}


@torch.inference_mode()
@pytest.mark.parametrize("text", [40, 1030])
def test_recorded_steps_have_the_bits_of_plain_ones(text: int):
    """With few text tokens the text's weights are not widened, with many they are."""
    flux = model()
    with widening.noted() as order:
        plain = [flux(**inputs(seed, text))[0] for seed in range(4)]
    assert len(order) % 4 == 0
    assert len(order) // 4 > widening.BUFFERS
    recorder = record(flux)
    for _ in range(3):
        for seed, wanted in enumerate(plain):
            assert torch.equal(flux(**inputs(seed, text))[0], wanted)
            torch.full((2**20,), float("nan"), device="cuda")  # memory that changes hands between the steps
    assert recorder.recordings == 1
    assert not recorder.refused


@torch.inference_mode()
@pytest.mark.parametrize("change", ["reversed", "the first missing", "one too many", "none"])
def test_layers_out_of_turn_are_widened_when_they_are_asked_for(change: str):
    flux, given = model(), inputs(0, 40)
    with widening.noted() as order:
        wanted = flux(**given)[0]
    said = {"reversed": order[::-1], "the first missing": order[1:], "one too many": [*order, order[0]], "none": []}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), widening.ahead(said[change]):
        out = flux(**given)[0]
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert torch.equal(out, wanted)


def test_a_lane_outside_a_graph_is_no_stream():
    lane, streams = Lane(torch.zeros(1, device="cuda")), []
    with lane:
        streams.append(torch.cuda.current_stream())
    lane.join()
    assert streams == [torch.cuda.current_stream()]


def test_a_lane_runs_beside_what_follows_and_is_waited_for():
    """Two hundred sums in the lane; what is read after the join has all of them."""
    x = torch.zeros(2**16, device="cuda")
    y, torn = torch.zeros_like(x), torch.zeros_like(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lane, main = Lane(x), torch.cuda.current_stream()
        with lane:
            assert torch.cuda.current_stream() != main
            for _ in range(200):
                y += 1
        torn += 1
        lane.join()
        out: Tensor = y + torn
    for turn in (1, 2):
        graph.replay()
        assert bool((out == 201 * turn).all())


@torch.inference_mode()
def test_an_error_in_a_lane_leaves_the_device_usable():
    """As one of memory would: the recording is given up, and steps run as they did."""
    flux, given = model(), inputs(0, 40)
    wanted = flux(**given)[0]
    recorder = record(flux)

    def fail(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("no more")

    flux(**given)
    handle = flux.single_transformer_blocks[1].act_mlp.register_forward_pre_hook(fail)
    before = torch.cuda.current_stream()
    assert torch.equal(flux(**given)[0], wanted)
    assert "no more" in recorder.refused
    assert torch.cuda.current_stream() == before
    assert torch.equal(flux(**given)[0], wanted)
    handle.remove()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flux(**given)[0]
    graph.replay()
    assert torch.equal(out, wanted)
