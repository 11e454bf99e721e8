"""Weight-only layers in one launch have the bits of one by one, and so has a FLUX whose blocks share that launch."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.graphs import record
from tests.gpu.test_sm80 import awq_on_device, pytestmark
from tests.models.test_modulation import (
    LAYERS,
    check_weights_that_come,
    groups,
    inputs,
    modulators,
    run,
    run_alone,
    small,
)
from tests.ops.cases import DTYPES, Case, random_awq, tokens

__all__ = ["groups", "pytestmark"]  # a fixture, and the marks of this module too


def packed(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> ops.PackedAwq:
    return ops.pack_awq(awq_on_device(random_awq(Case(1, n, k, 0), dtype, seed=n)), "sm80", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 4, 5, 9, 130])
@pytest.mark.parametrize("k", [64, 192, 1024, 3072])
def test_one_launch_has_the_bits_of_many(k: int, m: int, dtype: torch.dtype):
    layers = [packed(n, k, dtype) for n in (9216, 33, 16, 7, 2304, 1040)]
    x = tokens(Case(m, 7, k, 0), dtype).cuda()
    found = ops.awq_linears(x, layers)
    for y, layer in zip(found, layers, strict=True):
        assert torch.equal(y, ops.awq_linear(x, layer))
    assert all(torch.equal(y, again) for y, again in zip(found, ops.awq_linears(x, layers), strict=True))


@pytest.mark.parametrize("count", [1, 96, 97, 200])
def test_more_layers_than_a_launch_holds(count: int):
    few, x = [packed(n, 128) for n in (40, 16, 33)], tokens(Case(1, 7, 128, 0), torch.bfloat16).cuda()
    found = ops.awq_linears(x, [few[i % 3] for i in range(count)])
    wanted = [ops.awq_linear(x, layer) for layer in few]
    assert all(torch.equal(y, wanted[i % 3]) for i, y in enumerate(found))


def test_scales_of_both_types_in_one_launch():
    layers, x = [packed(40, 128), packed(33, 128, torch.float16)], tokens(Case(2, 7, 128, 0), torch.bfloat16).cuda()
    found = ops.awq_linears(x, layers)
    assert all(torch.equal(y, ops.awq_linear(x, layer)) for y, layer in zip(found, layers, strict=True))


@pytest.mark.parametrize("batch", [1, 2, 4, 5])
def test_a_step_has_the_same_bits(batch: int, groups: list[int]):
    model = small("cuda")
    wanted = run_alone(model, "cuda", batch)
    assert torch.equal(run(model, "cuda", batch), wanted)
    assert groups == [LAYERS]


def test_a_step_with_a_lora_on_a_modulation_layer(groups: list[int]):
    model = small("cuda")
    first, second, *_ = modulators(model)
    draw = torch.Generator("cuda").manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")  # noqa: E731
    first.extend_branch(made(16, 128), made(first.out_features, 16), torch.ones(16, device="cuda"))
    second.bias_delta = made(second.out_features).bfloat16()
    assert torch.equal(run(model, "cuda"), run_alone(model, "cuda"))
    assert groups == [LAYERS - 2]
    first.extend_branch(None, None, None)
    second.bias_delta = None
    assert torch.equal(run(model, "cuda"), run_alone(model, "cuda"))
    assert groups[1:] == [LAYERS]


@torch.inference_mode()
def test_recorded_steps_have_the_same_bits(groups: list[int]):
    model, batches = small("cuda"), (1, 4)
    wanted = {batch: run_alone(model, "cuda", batch) for batch in batches}
    recorder = record(model)
    for batch in batches:
        for _ in range(4):
            assert torch.equal(run(model, "cuda", batch), wanted[batch])
    assert not recorder.refused
    assert recorder.recordings == len(batches)
    assert groups == [LAYERS] * 4  # the first call and the recorded one of each shape
    again = {name: value * 0.5 if name == "pooled_projections" else value for name, value in inputs("cuda").items()}
    replayed = model(**again)[0]
    recorder.forget()
    assert not torch.equal(replayed, wanted[1])
    assert torch.equal(model(**again)[0], replayed)


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_come_for_their_calls(streamed: bool, groups: list[int]):
    check_weights_that_come("cuda", streamed, groups)
