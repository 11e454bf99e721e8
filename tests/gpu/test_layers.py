"""Each part of the small FLUX on the device, given what it was given on the CPU: where the two first part ways.

Whole pictures in W4A4 cannot tell: two backends of one CPU, which give the same codes for the same numbers, give
pictures that differ as much, because a sum that is rounded the other way moves a code by a step (a seventh of a group's
largest value), and the next layer's codes follow. Part by part the answer is exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import ops
from engine.generate import Engine
from engine.linear import AWQLinear, SVDQuantLinear
from engine.models.catalogue import zoo_folder
from engine.models.flux_blocks import FusedDoubleBlock, FusedSingleBlock
from engine.request import Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PARTS = (SVDQuantLinear, AWQLinear, FusedDoubleBlock, FusedSingleBlock)
# By the norm of the output. Both sides add in float32 and round to 16 bits; a block's linears move codes of each other.
ALLOWED = {"SVDQuantLinear": 2**-8, "AWQLinear": 2**-8, "FusedDoubleBlock": 0.2, "FusedSingleBlock": 0.2}


def moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part) for part in value)
    return {key: moved(part) for key, part in value.items()} if isinstance(value, dict) else value


def joined(value: Any) -> Tensor:
    parts = value if isinstance(value, tuple) else (value,)
    return torch.cat([part.float().flatten().cpu() for part in parts])


@torch.inference_mode()
def test_every_part_gives_what_it_gives_on_the_cpu():
    if not (zoo_folder() / "flux-tiny" / "vae").is_dir():
        pytest.skip("the zoo's weights are not here")
    engines = {where: Engine.load("tiny", "int4", device=where, activation="w4a4") for where in ("cpu", "cuda")}
    calls: dict[str, tuple[Any, Any, Any]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
            calls[name] = (args, kwargs, out)

        return hook

    there = dict(engines["cuda"].pipe.transformer.named_modules())
    for name, module in engines["cpu"].pipe.transformer.named_modules():
        if isinstance(module, PARTS):
            module.register_forward_hook(note(name), with_kwargs=True)
    engines["cpu"].run(Request(prompt="a large red metal sphere left of a small blue cube", seed=7, steps=1))
    assert calls
    worst: dict[str, tuple[float, str]] = {}
    for name, (args, kwargs, out) in calls.items():
        module = there[name]
        got, wanted = joined(module(*moved(args), **moved(kwargs))), joined(out)
        kind, lost = type(module).__name__, float((got - wanted).norm() / wanted.norm())
        worst[kind] = max(worst.get(kind, (0.0, "")), (lost, name))
        if isinstance(module, SVDQuantLinear):
            mine = engines["cpu"].pipe.transformer.get_submodule(name)
            codes = [
                ops.quantize_act(x, layer.packed, layer.mode)
                for x, layer in ((args[0], mine), (args[0].cuda(), module))
            ]
            assert torch.equal(codes[0].codes, codes[1].codes.cpu()), f"{name}: codes differ"
            assert torch.equal(codes[0].scales, codes[1].scales.cpu()), f"{name}: scales differ"
    for kind, (lost, name) in worst.items():
        print(f"{kind}: at most {lost:.2e}, in {name}")
        assert lost <= ALLOWED[kind], f"{name}: {lost:.2e} of its output's norm"
