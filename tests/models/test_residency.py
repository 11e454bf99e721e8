"""Networks that share too little memory paint the same pictures. The device is the CPU: a copy stands for a move."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine import Engine, Request
from engine.errors import ArgumentError
from engine.lora import load_lora, set_lora_strength, unload_lora
from engine.memory import module_bytes
from engine.models.loading import parts
from engine.residency import GIB, RESERVE, Room, _rooms, room_on

CPU = torch.device("cpu")


def budget(weights: int) -> int:
    return int(RESERVE * GIB) + weights


def painted(engine: Engine) -> np.ndarray:
    return np.asarray(engine.run(Request("a red cube", seed=3, steps=2, width=128, height=128)).image)


@pytest.mark.parametrize("precision", ["int4", "bf16"])
@pytest.mark.parametrize("plan", ["one at a time", "all but the transformer together", "block by block"])
def test_the_same_picture_within_the_budget(precision: str, plan: str):
    engine = Engine.load("tiny", precision, device="cpu")
    wanted, networks = painted(engine), parts(engine.pipe)
    sizes = {name: module_bytes(part) for name, part in networks.items()}
    transformer = sizes.pop("transformer")
    weights = (
        max(transformer, *sizes.values()) if plan != "block by block" else max(*sizes.values(), transformer * 3 // 4)
    )
    room = Room(CPU, None if plan == "one at a time" else budget(weights))
    room.seat(engine.pipe)
    for _ in range(2):
        assert np.array_equal(painted(engine), wanted)
    if plan == "one at a time":
        assert room.most == max(transformer, *sizes.values())
    else:
        assert weights // 2 < room.most <= weights
    assert engine.pipe._execution_device == CPU


def test_a_lora_changes_at_home():
    engine = Engine.load("tiny-canny", "int4", device="cpu")
    lora = engine.spec.lora
    transformer = engine.pipe.transformer
    room = _rooms[CPU] = Room(CPU, budget(module_bytes(transformer) * 3 // 4))
    try:
        room.admit_transformer(transformer)
        draw = torch.Generator().manual_seed(0)
        made = lambda *shape: torch.randn(*shape, generator=draw).bfloat16()  # noqa: E731
        config, side = transformer.config, 4
        given = dict(
            hidden_states=made(1, side**2, config.in_channels),
            encoder_hidden_states=made(1, 7, config.joint_attention_dim),
            pooled_projections=made(1, config.pooled_projection_dim),
            timestep=torch.tensor([0.5]), img_ids=torch.zeros(side**2, 3), txt_ids=torch.zeros(7, 3),
            guidance=torch.tensor([3.5]), return_dict=False,
        )  # fmt: skip
        with torch.inference_mode():
            first = transformer(**given)[0]
            set_lora_strength(transformer, engine.spec.name, 0.3)
            weaker = transformer(**given)[0]
            assert not torch.equal(first, weaker)
            assert room.held > 0
            unload_lora(transformer, engine.spec.name)
            assert room.held == 0
            load_lora(transformer, lora, name=engine.spec.name)
            assert torch.equal(transformer(**given)[0], first)
    finally:
        del _rooms[CPU]


def test_budgets_that_cannot_be_kept_are_refused():
    with pytest.raises(ArgumentError, match="vram_budget: expected a model on a GPU, got one on cpu"):
        Engine.load("tiny", "int4", device="cpu", vram_budget=8)
    with pytest.raises(ArgumentError, match="offload: expected a model on a GPU"):
        Engine.load("tiny", "int4", device="cpu", offload=True)
    with pytest.raises(ArgumentError, match=r"vram_budget: expected more than 2.5 GiB, got 2"):
        room_on(CPU, 2)
    room = Room(CPU, budget(1000))
    with pytest.raises(ArgumentError, match=r"vram_budget: expected at least 2\.5 for Linear, which"):
        room.admit(torch.nn.Linear(100, 100))
