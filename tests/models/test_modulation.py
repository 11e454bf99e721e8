"""Modulation layers of a step, multiplied at once, give what each gives by itself; and only where that is safe."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from bench.random_models import randomly_quantized
from engine import ops
from engine.linear import AWQLinear
from engine.models import flux, modulation
from engine.models.flux_blocks import _norms, unfuse_blocks
from engine.residency import GIB, RESERVE, Room, Unit
from tests.models.conftest import CONFIG, flux_inputs

LAYERS = 6  # of two double and two single blocks


def small(device: str = "cpu") -> Any:
    """A 4-bit FLUX of random weights with fused blocks."""
    config = CONFIG | {"num_layers": 2, "num_single_layers": 2}
    return randomly_quantized(FluxTransformer2DModel, flux, device, config, "auto", 32)


def inputs(device: str = "cpu", batch: int = 1) -> dict[str, Any]:
    made = {name: value.to(device) for name, value in flux_inputs().items()}
    whole = {name: value for name, value in made.items() if name.endswith("_ids")}
    return made | {name: value.repeat_interleave(batch, 0) for name, value in made.items() if name not in whole} | {
        "return_dict": False
    }  # fmt: skip


def modulators(model: Any) -> list[AWQLinear]:
    return [module for module in model.modules() if isinstance(module, AWQLinear)]


@torch.no_grad()
def run(model: Any, device: str = "cpu", batch: int = 1) -> Tensor:
    return model(**inputs(device, batch))[0]


@torch.no_grad()
def run_alone(model: Any, device: str = "cpu", batch: int = 1) -> Tensor:
    """A step whose layers are called one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modulation, "step_blocks", lambda block: [])
        return run(model, device, batch)


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call at once had. Afterwards nothing may be left of any step."""
    sizes, real = [], ops.awq_linears

    def counted(x: Tensor, layers: list[ops.PackedAwq]) -> list[Tensor]:
        sizes.append(len(layers))
        return real(x, layers)

    monkeypatch.setattr(ops, "awq_linears", counted)
    yield sizes
    gc.collect()
    assert len(modulation._steps) == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_bits_in_one_call(batch: int, groups: list[int]):
    model = small()
    wanted = run_alone(model, batch=batch)
    assert groups == []
    assert torch.equal(run(model, batch=batch), wanted)
    with torch.inference_mode():
        assert torch.equal(run(model, batch=batch), wanted)
    assert groups == [LAYERS, LAYERS]


def test_layers_with_a_lora_or_hooks_go_by_themselves(groups: list[int]):
    model = small()
    first, second, *_, last = modulators(model)
    draw = torch.Generator().manual_seed(0)
    first.extend_branch(torch.randn(16, 128, generator=draw), torch.randn(first.out_features, 16), torch.ones(16))
    second.bias_delta = torch.ones(second.out_features, dtype=torch.bfloat16)
    seen: list[Any] = []
    last.register_forward_hook(lambda *_: seen.append(1))
    wanted = run_alone(model)
    assert torch.equal(run(model), wanted)
    assert groups == [LAYERS - 3]
    assert len(seen) == 2
    first.extend_branch(None, None, None)
    second.bias_delta = None
    assert not torch.equal(run(model), wanted)
    assert groups[1:] == [LAYERS - 1]


def test_blocks_with_hooks_go_by_themselves(groups: list[int]):
    model = small()
    wanted = run_alone(model)
    handle = model.single_transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert torch.equal(run(model), wanted)
    handle.remove()
    assert groups == [LAYERS - 1]
    model.transformer_blocks[0].register_forward_hook(lambda *_: None)
    assert torch.equal(run(model), wanted)
    assert groups == [LAYERS - 1]


def test_gradients_and_unfused_blocks_are_left_alone(groups: list[int]):
    model = small()
    model(**inputs())
    unfuse_blocks(model)
    run(model)
    assert groups == []


def ask(block: Any, temb: Tensor) -> Tensor:
    """What a block is given."""
    return torch.cat(modulation.modulations(block, temb, _norms), dim=1)


def alone(block: Any, temb: Tensor) -> Tensor:
    return torch.cat([norm.linear(norm.silu(temb)) for norm in _norms(block)], dim=1)


@torch.no_grad()
def test_nothing_stale_is_used(groups: list[int]):
    model, temb = small(), torch.randn(1, 128).bfloat16()
    first, second = model.transformer_blocks
    third, fourth = model.single_transformer_blocks
    assert torch.equal(ask(first, temb), alone(first, temb))
    with torch.inference_mode():
        assert torch.equal(ask(second, temb), alone(second, temb))
    other = temb * 2  # another tensor
    assert torch.equal(ask(third, other), alone(third, other))
    temb.mul_(-1)  # the same one, changed
    assert torch.equal(ask(third, temb), alone(third, temb))
    assert torch.equal(ask(first, temb), alone(first, temb))
    layer = third.norm.linear  # packed anew, with other weights
    weight = ops.unpack_awq(layer.packed)
    layer._hold(ops.pack_awq(ops.AwqWeight(weight.codes, weight.scales * 2, weight.zeros, None), layer.backend))
    assert torch.equal(ask(third, temb), alone(third, temb))
    fourth.norm.linear.bias_delta = torch.ones(384, dtype=torch.bfloat16)
    assert torch.equal(ask(fourth, temb), alone(fourth, temb))
    assert groups == [LAYERS, LAYERS]


@torch.no_grad()
def test_a_step_begins_anew_with_the_first_block(groups: list[int]):
    """An embedding without versions may have been filled anew."""
    model = small()
    first, second = model.transformer_blocks
    with torch.inference_mode():
        temb = torch.randn(1, 128).bfloat16()
        ask(first, temb)
        temb.mul_(-1)
        assert torch.equal(ask(first, temb), alone(first, temb))
        assert torch.equal(ask(second, temb), alone(second, temb))
    assert groups == [LAYERS, LAYERS]


@torch.no_grad()
def test_what_is_kept_goes_with_the_embedding():
    model, temb = small(), torch.randn(1, 128).bfloat16()
    ask(model.transformer_blocks[0], temb)
    assert len(modulation._steps) == 1
    del temb
    gc.collect()
    assert len(modulation._steps) == 0


@torch.no_grad()
def test_another_activation_is_asked(groups: list[int]):
    model = small()
    model.single_transformer_blocks[1].norm.silu = nn.GELU()
    assert torch.equal(run(model), run_alone(model))
    assert groups == [LAYERS - 1]


def check_weights_that_come(device: str, streamed: bool, groups: list[int]) -> None:
    """As a whole they are there before the first block is called; block by block each layer goes by itself."""
    model = small(device)
    whole = Unit(model, [model])
    for tensor in whole._tensors():
        tensor.data = tensor.data.cpu()
    where = torch.empty(0, device=device).device
    room = Room(where, int(RESERVE * GIB) + (whole.bytes * 19 // 20 if streamed else 2 * whole.bytes))
    room.admit_transformer(model)
    for _ in range(3):
        assert torch.equal(run(model, device), run_alone(model, device))
    assert groups == ([] if streamed else [LAYERS] * 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_weights_that_come_for_their_calls(streamed: bool, groups: list[int]):
    check_weights_that_come("cpu", streamed, groups)
