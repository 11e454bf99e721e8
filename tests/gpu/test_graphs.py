"""Recorded forwards give the bits of plain ones, and the zoo's pictures on the device are those of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.generate import Engine
from engine.graphs import record, unrecorded
from engine.metrics import psnr
from engine.models.catalogue import zoo_folder
from engine.request import Request
from tests.models.conftest import flux_inputs, small_flux

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(tokens: int, seed: int) -> dict:
    made = flux_inputs(tokens=tokens, seed=seed)
    return {name: value.cuda() for name, value in made.items()} | {"return_dict": False}


def on_device() -> Any:
    torch.nn.Module.cuda(model := small_flux())
    return model


@torch.inference_mode()
def test_replays_are_the_same_bits():
    model = on_device()
    plain = {(tokens, seed): model(**inputs(tokens, seed))[0] for tokens in (16, 32, 64) for seed in (1, 2)}
    recorder = record(model)
    assert record(model) is recorder
    for tokens in (16, 32, 64):
        for seed in (1, 2, 1):
            assert torch.equal(model(**inputs(tokens, seed))[0], plain[tokens, seed])
        assert recorder.recordings == min(tokens // 16, recorder.KEPT)
    assert not recorder.refused


@torch.inference_mode()
def test_a_change_of_weights_is_seen_after_forgetting():
    model = on_device()
    recorder = record(model)
    before = [model(**inputs(16, 1))[0] for _ in range(3)][-1]
    model.proj_out = torch.nn.Linear(128, 16, dtype=torch.bfloat16, device="cuda")
    recorder.forget()
    assert not torch.equal(model(**inputs(16, 1))[0], before)


@torch.inference_mode()
def test_what_cannot_be_recorded_runs_plainly():
    model = on_device()
    recorder = record(model)

    def read_back(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        assert kwargs["temb"].sum().item() == kwargs["temb"].sum().item()  # a graph cannot hold this

    blocks: Any = model.single_transformer_blocks
    blocks[0].register_forward_pre_hook(read_back, with_kwargs=True)
    outs = [model(**inputs(16, 1))[0] for _ in range(3)]
    assert recorder.refused
    assert all(torch.equal(out, outs[0]) for out in outs)


@torch.inference_mode()
def test_hooks_on_layers_are_called_where_nothing_is_recorded():
    model = on_device()
    recorder, blocks = record(model), [*model.single_transformer_blocks]
    before = [model(**inputs(16, 1))[0] for _ in range(3)][-1]
    seen: list[torch.Size] = []
    handle = blocks[0].proj_mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    with unrecorded(model):
        outs = [model(**inputs(16, 1))[0] for _ in range(3)]
    handle.remove()
    assert len(seen) == 3
    assert recorder.recordings == 0
    assert all(torch.equal(out, before) for out in outs)


@pytest.mark.parametrize("activation", ["w4a8", "w4a4"])
def test_pictures_are_those_of_the_cpu(activation: str, monkeypatch: pytest.MonkeyPatch):
    """In W4A4 40 dB, or as near as two backends of the CPU are to each other less 4 dB; in W4A8 30 dB.

    40 dB is the project's goal for W4A4, and not the bound: AVX2 and the reference, whose codes are the same for the
    same numbers, are about that far apart themselves, on either side of it, since a sum that is rounded the other way
    moves a code by a step, and the layers after it follow. So below 40 dB need not be wrong; test_layers.py says
    part by part what is. In W4A8 the tokens differ by design: INT8 on the CPU, e4m3 here.
    """
    if not (zoo_folder() / "flux-tiny" / "vae").is_dir():
        pytest.skip("the zoo's weights are not here")
    request = Request(prompt="a large red metal sphere left of a small blue cube", seed=7)

    def picture(device: str) -> Any:
        return Engine.load("tiny", "int4", device=device, activation=activation).run(request).image

    engine = Engine.load("tiny", "int4", device="cuda", activation=activation)
    there, again, here = engine.run(request).image, engine.run(request).image, picture("cpu")
    assert np.array_equal(np.asarray(there), np.asarray(again))
    monkeypatch.setenv("ENGINE_BACKEND", "reference")
    found, among_themselves = psnr(there, here), psnr(picture("cpu"), here)
    print(f"{activation}: {found:.1f} dB, two backends of the CPU {among_themselves:.1f} dB")
    assert found >= (min(40, among_themselves - 4) if activation == "w4a4" else 30)
