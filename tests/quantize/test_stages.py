"""Each stage of the quantizer can be left out, and what it leaves behind can be run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import quantize_stages
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import read_quantization
from engine.checkpoint.translate import convert
from engine.errors import ArgumentError, CheckpointError
from engine.models import loading
from engine.models.catalogue import resolve
from engine.quantize import Recipe, quantize_group, quantize_model
from engine.quantize.__main__ import main
from engine.quantize.inputs import Inputs
from engine.quantize.layer import quantize_weight_only
from engine.quantize.nvfp4 import round_nvfp4
from engine.quantize.rounding import round_int4

PLAIN = Recipe(rank=16, rounds=1, alphas=(), gptq=False, search=False)


def drawn() -> tuple[torch.Tensor, Inputs]:
    """A weight, and GELU outputs with channels of many sizes."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=draw)
    sizes = torch.logspace(-1, 1, 128)
    rows = torch.nn.functional.gelu(torch.randn(512, 128, generator=draw)) * sizes
    return weight, Inputs(rows, rows.abs().amax(0))


@pytest.mark.parametrize("stage", [{"search": True}, {"alphas": (0.5,)}, {"rank": 32}, {"rounds": 4}])
def test_each_stage_lowers_the_error_of_a_layer(stage: dict):
    weight, inputs = drawn()
    without, with_it = (
        quantize_group(weight, inputs, recipe).error for recipe in (PLAIN, dataclasses.replace(PLAIN, **stage))
    )
    assert with_it < without


def test_the_shift_spares_a_bit_for_the_sign():
    weight, inputs = drawn()
    signed, shifted = (quantize_group(weight, inputs, PLAIN, unsigned=unsigned).error for unsigned in (False, True))
    assert shifted < signed


def test_without_search_the_largest_weight_is_the_largest_code():
    weight, inputs = drawn()
    _, scales, _ = round_int4(weight, torch.ones(128), torch.float32, search=False)
    torch.testing.assert_close(scales, weight.unflatten(1, (-1, 64)).abs().amax(-1) / 7)
    searched, plain = (quantize_weight_only(weight, inputs, Recipe(search=search))[1] for search in (True, False))
    assert searched < plain


def test_four_over_six_is_a_choice_of_each_group():
    weight, _ = drawn()
    errors = [float((weight - round_nvfp4(weight, torch.ones(128), torch.float32, tops)[-1]).norm()) for tops in
              ((6.0,), (4.0,), (6.0, 5.0, 4.0))]  # fmt: skip
    assert errors[2] < min(errors[:2])


def test_a_checkpoint_without_the_shift_says_so_and_runs_so(model: Path, tmp_path: Path):
    out = tmp_path / "int4"
    assert main([str(model), "--out", str(out), "--no-shift", "--no-smooth", "--no-search", "--rank", "16", "--rounds",
                 "1", "--no-report", "--device", "cpu"]) == 0  # fmt: skip
    files = open_checkpoint(out)
    assert not read_quantization(files).gelu_shift
    files.close()
    spec = dataclasses.replace(resolve(str(model)), checkpoints={"int4": str(out)})
    close = loading.quantized_transformer(spec, "int4", "reference", "w4a4", torch.device("cpu"))
    assert not any(getattr(part, "unsigned_input", False) for part in close.modules())
    with pytest.raises(CheckpointError, match="GELU outputs that keep their sign, which nunchaku shifts"):
        convert(out, tmp_path / "x.safetensors", "nunchaku")
    with pytest.raises(ArgumentError, match="shift: nunchaku always shifts GELU outputs"):
        quantize_model(
            str(model), tmp_path / "y.safetensors", recipe=Recipe(shift=False), format="nunchaku", device="cpu"
        )


def test_the_table_tells_gains_of_the_same_pictures():
    rows = [
        {"model": "tiny", "stage": "a", "title": "first", "beside": "", "error_w4a4": 0.1, "error_w4a8": 0.05,
         "psnr": {"w4a4": [30.0, 32.0], "w4a8": [33.0, 33.0]}},
        {"model": "tiny", "stage": "b", "title": "second", "beside": "a", "error_w4a4": None, "error_w4a8": None,
         "psnr": {"w4a4": [31.0, 35.0], "w4a8": [34.0, 34.0]}},
    ]  # fmt: skip
    lines = quantize_stages.table({"rows": rows}).splitlines()
    assert lines[-2] == "| first | 0.1000 | 0.0500 | 31.0 |  | 33.0 |  |"
    assert lines[-1] == "| second |  |  | 33.0 | +2.0 (1.0) | 34.0 | +1.0 (0.0) |"


def test_every_row_has_the_row_it_is_compared_with_before_it():
    names = list(quantize_stages.STAGES)
    for name, stage in quantize_stages.STAGES.items():
        assert not stage.beside or names.index(stage.beside) < names.index(name)
    assert quantize_stages.STAGES["shift"].recipe == Recipe()
