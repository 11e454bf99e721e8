"""The ops as torch sees them: shapes without data, and compilation of a whole graph."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.errors import ArgumentError
from tests.ops.cases import Case, random_awq, random_linear, tokens

CASE = Case(6, 40, 128, 16)


def arguments(name: str, backend: str) -> tuple:
    x = tokens(CASE, torch.bfloat16)
    packed, awq = ops.pack(random_linear(CASE), backend), ops.pack_awq(random_awq(CASE), backend)
    act = ops.quantize_act(x, packed, "int4")
    return {
        "quantize_act": (x, packed.blob, packed.spec.key, "int4"),
        "linear": (*act, packed.blob, packed.spec.key, torch.float16),
        "svdq_linear": (x.view(2, 3, 128), packed.blob, packed.spec.key, "int8"),
        "awq_linear": (x.view(2, 3, 128), awq.blob, awq.spec.key),
        "awq_linears": (x.view(2, 3, 128), [awq.blob, awq.blob], [awq.spec.key] * 2),
    }[name]


@pytest.mark.parametrize("name", ["quantize_act", "linear", "svdq_linear", "awq_linear", "awq_linears"])
def test_schema_and_fake_agree_with_the_kernel(backend: str, name: str):
    torch.library.opcheck(
        getattr(torch.ops.nibble, name).default,
        arguments(name, backend),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_whole_graph_compiles(backend: str):
    packed, awq = ops.pack(random_linear(CASE), backend), ops.pack_awq(random_awq(Case(1, 128, 128, 0)), backend)

    def layer(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(ops.awq_linear(x, awq))
        act = ops.quantize_act(hidden, packed, "uint4")
        return ops.linear(act, packed) + ops.svdq_linear(hidden, packed, "int8")

    x = tokens(CASE, torch.bfloat16)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(("mode", "dtype"), [("int4", torch.int8), ("uint4", torch.uint8)])
def test_pairs_are_known_before_the_run(mode: str, dtype: torch.dtype):
    packed, x = ops.pack(random_linear(CASE), "sm80"), tokens(CASE, torch.bfloat16).to("meta")
    packed = ops.PackedLinear(packed.blob.to("meta"), packed.spec, packed.dtype)
    act = ops.quantize_act(x, packed, mode, pairs=True)
    assert (act.codes.dtype, act.codes.shape, act.scales.shape) == (dtype, (1, 2, 512), (6, 2))
    assert ops.linear(act, packed).shape == (6, 40)
    assert ops.linear(ops.quantize_act(x, packed, mode), packed).shape == (6, 40)  # a code a byte
    for wrong in (act.codes[:, :1], act.codes[0], act.codes.float()):
        with pytest.raises(ArgumentError, match=r"act\.codes: expected"):
            ops.linear(act._replace(codes=wrong), packed)
    with pytest.raises(ArgumentError, match=r"act\.codes: expected shape \(1, 128\)"):
        ops.linear(act, ops.PackedLinear(packed.blob, ops.pack(random_linear(CASE), "reference").spec, packed.dtype))
