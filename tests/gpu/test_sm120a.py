"""The NVFP4 kernels of consumer Blackwell against the reference: written without such a card, to be the first to run.

Read failures from the top: each test needs what the ones before it show.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine import ops
from engine.ops import backends, reference
from engine.ops.canonical import split_nibbles
from tests.gpu.test_sm90a import on_device
from tests.ops.cases import CASES, EPSILON, STRIDES, Case, check_a_bad_token, tokens
from tests.ops.test_wgmma64 import random_nvfp4

RUNS = torch.cuda.is_available() and torch.cuda.get_device_capability() == (12, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not RUNS, reason="needs a device of compute capability 12.0"),
    pytest.mark.skipif(backends.cuda_kernels() is None, reason="the CUDA module was not built (no nvcc)"),
]
LARGE = (Case(512, 3072, 3072, 32), Case(200, 2240, 2240, 64), Case(1000, 1001, 640, 16), Case(129, 129, 192, 0))


def layer(case: Case) -> ops.CanonicalLinear:
    return random_nvfp4(case.n, case.k, case.rank)


def magnitudes(act: ops.QuantizedAct, weight: ops.CanonicalLinear) -> Tensor:
    """The sum of all terms' magnitudes, element by element."""
    terms = reference.token_values(act, torch.float64).abs() @ ops.dequantize(weight, torch.float64).abs().T
    if weight.lora_up is not None:
        terms += act.low_rank.double().abs() @ weight.lora_up.double().abs().T
    return terms if weight.bias is None else terms + weight.bias.double().abs()


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_codes_and_scales_are_equal(case: Case):
    weight, x = layer(case), tokens(case, torch.bfloat16)
    wanted = reference.quantize_act(x, weight.smooth, weight.lora_down, "nvfp4", torch.float64)
    act = ops.quantize_act(x.cuda(), ops.pack(on_device(weight), "sm120a"), "nvfp4")
    assert torch.equal(act.scales.cpu().view(torch.uint8), wanted.scales.view(torch.uint8))
    assert torch.equal(split_nibbles(act.codes.cpu()), split_nibbles(wanted.codes))
    torch.testing.assert_close(act.low_rank.double().cpu(), wanted.low_rank, rtol=1e-5, atol=4e-5)


def test_one_product_of_one_tile():
    """A product of 16 tokens and 8 outputs whose every number and scale differs: what the unit's layouts decide."""
    weight = random_nvfp4(8, 64, 0, factors=False)
    x = tokens(Case(16, 8, 64, 0), torch.bfloat16) * torch.logspace(-2, 2, 64).bfloat16()
    packed = ops.pack(on_device(weight), "sm120a")
    act = ops.quantize_act(x.cuda(), packed, "nvfp4")
    error = ops.linear(act, packed, torch.float32).double() - reference.linear(act, on_device(weight), torch.float64)
    assert (error.abs() <= magnitudes(act, on_device(weight)) * 2.0**-13).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_results_are_close(case: Case, dtype: torch.dtype):
    weight = layer(case)
    there, packed = on_device(weight), ops.pack(on_device(weight), "sm120a")
    x = tokens(case, dtype).cuda()
    act = ops.quantize_act(x, packed, "nvfp4")
    y = ops.linear(act, packed, dtype)
    rounded = act._replace(low_rank=act.low_rank.bfloat16())
    exact = reference.linear(rounded, there, torch.float64)
    # 2^-13 of all terms is what Hopper's units keep of 8-bit numbers at worst; nobody has measured these.
    allowed = exact.abs() * EPSILON[dtype] + magnitudes(rounded, there) * 2.0**-13 + torch.finfo(dtype).smallest_normal
    error = (y.double() - exact).abs()
    assert (error <= allowed).all(), f"worst is {(error / allowed).max():.2f} times the allowed error"
    assert (error.norm() / exact.norm()) <= EPSILON[dtype] + 2.0**-16
    assert torch.equal(ops.svdq_linear(x, packed, "nvfp4").view(y.shape), y)


@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides_give_the_same_bits(strides: str):
    case = Case(19, 40, 256, 16)
    packed = ops.pack(on_device(layer(case)), "sm120a")
    x = tokens(case, torch.bfloat16, strides)
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)
    y = ops.svdq_linear(there, packed, "nvfp4")
    assert torch.equal(y, ops.svdq_linear(x.cuda().contiguous(), packed, "nvfp4"))
    assert not y.isnan().any()


@pytest.mark.parametrize("n", [96, 97])
def test_gelu_is_applied_before_rounding(n: int):
    case = Case(70, n, 320, 16)
    packed, x = ops.pack(on_device(layer(case)), "sm120a"), tokens(case, torch.bfloat16).cuda()
    y = ops.linear(ops.quantize_act(x, packed, "nvfp4"), packed, torch.float32)
    wanted = torch.nn.functional.gelu(y, approximate="tanh")
    torch.testing.assert_close(ops.svdq_linear(x, packed, "nvfp4", gelu=True).float(), wanted, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_its_own_row_only(bad: float):
    case = Case(17, 32, 128, 0)
    packed, x = ops.pack(on_device(layer(case)), "sm120a"), tokens(case, torch.bfloat16).cuda()
    check_a_bad_token(packed, x, bad, "nvfp4")


def test_no_tokens():
    packed = ops.pack(on_device(layer(Case(3, 24, 64, 16))), "sm120a")
    assert ops.svdq_linear(torch.empty(2, 0, 64, device="cuda"), packed, "nvfp4").shape == (2, 0, 24)


def test_the_same_bits_again():
    case = Case(300, 400, 1536, 32)
    packed, x = ops.pack(on_device(layer(case)), "sm120a"), tokens(case, torch.bfloat16).cuda()
    first = ops.svdq_linear(x, packed, "nvfp4")
    assert all(torch.equal(first, ops.svdq_linear(x, packed, "nvfp4")) for _ in range(20))


def test_packing_on_the_device_gives_the_same_bytes():
    weight = layer(Case(1, 200, 320, 32))
    assert torch.equal(ops.pack(on_device(weight), "sm120a").blob.cpu(), ops.pack(weight, "sm120a").blob)
