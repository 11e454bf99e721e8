"""Packing is exactly invertible, and packed layers are small."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops.canonical import join_nibbles, split_nibbles
from engine.ops.spec import parse
from tests.ops.cases import Case, random_awq, random_linear

cases = st.builds(
    Case,
    m=st.just(1),
    n=st.integers(1, 70),
    k=st.integers(1, 6).map(lambda i: 64 * i),
    rank=st.sampled_from((0, 16, 48)),
)
half = st.sampled_from((torch.bfloat16, torch.float16))
backends = st.sampled_from(("avx512", "amx", "avx2", "scalar", "sm80", "reference"))


def assert_same_bits(one: ops.CanonicalLinear | ops.AwqWeight, other: ops.CanonicalLinear | ops.AwqWeight) -> None:
    for name, tensor in vars(one).items():
        twin = getattr(other, name)
        if tensor is None:
            assert twin is None
        else:
            assert twin.dtype == tensor.dtype
            assert torch.equal(twin.view(torch.uint8), tensor.view(torch.uint8)), name


@settings(max_examples=60, deadline=None)
@given(case=cases, dtype=half, backend=backends, smooth=st.booleans(), bias=st.booleans(), seed=st.integers(0, 99))
def test_unpack_is_the_inverse_of_pack(case, dtype, backend, smooth, bias, seed):
    weight = random_linear(case, dtype, seed, smooth, bias)
    packed = ops.pack(weight, backend, dtype)
    assert (packed.n, packed.k, packed.rank, packed.backend) == (case.n, case.k, case.rank, backend)
    assert_same_bits(weight, ops.unpack(packed))


@settings(max_examples=30, deadline=None)
@given(case=cases, dtype=half, backend=backends, seed=st.integers(0, 99))
def test_unpack_awq_is_the_inverse_of_pack_awq(case, dtype, backend, seed):
    weight = random_awq(case, dtype, seed)
    assert_same_bits(weight, ops.unpack_awq(ops.pack_awq(weight, backend, dtype)))


@given(n=st.integers(1, 9), k=st.integers(1, 9), seed=st.integers(0, 99))
def test_nibbles_round_trip(n, k, seed):
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(join_nibbles(split_nibbles(codes)), codes)


def test_nibble_order_and_sign():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 0x8F  # inputs 0 and 1: -1 and -8
    weight = ops.CanonicalLinear(codes, torch.full((1, 1), 2.0, dtype=torch.bfloat16))
    assert ops.dequantize(weight)[0, :3].tolist() == [-2.0, -16.0, 0.0]


def test_packed_bytes_stay_below_30_percent_of_bf16():
    packed = ops.pack(random_linear(Case(1, 3072, 3072, 32)), "avx512")
    assert packed.nbytes <= 0.30 * 2 * 3072 * 3072
    assert packed.nbytes == sum(tensor.numel() for tensor in packed.tensors().values())


def test_key_says_everything():
    spec = ops.pack(random_linear(Case(1, 33, 128, 16)), "avx512").spec
    assert parse(spec.key) == spec
    assert spec.key == "svdq/avx512/33/128/16/u8,bf16,bf16,bf16,bf16,bf16,-,-"


def nvfp4(n: int = 24, k: int = 128) -> ops.CanonicalLinear:
    draw = torch.Generator().manual_seed(3)
    return ops.CanonicalLinear(
        codes=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw),
        wscales=(torch.rand(n, k // 16, generator=draw) * 4).to(torch.float8_e4m3fn),
        wtscale=torch.tensor([0.01]),
        wcscales=torch.rand(n, generator=draw).to(torch.bfloat16),
    )


def test_nvfp4_opens_on_the_cpu_through_the_reference():
    weight = nvfp4()
    packed = ops.pack(weight, "avx512")
    assert (packed.backend, packed.kind) == ("reference", "nvfp4")
    assert_same_bits(weight, ops.unpack(packed))
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(4))
    y = ops.svdq_linear(x, packed, "int8")
    dense = x @ ops.dequantize(weight).T
    assert (y - dense).norm() < 0.01 * dense.norm()


def test_e2m1_and_its_scales():
    weight = nvfp4()
    weight.codes[0, 0] = 0x9B  # input 0: code 11 = -1.5; input 1: code 9 = -0.5
    assert weight.wtscale is not None
    assert weight.wcscales is not None
    scale = weight.wscales[0, 0].float() * weight.wtscale * weight.wcscales[0].float()
    torch.testing.assert_close(ops.dequantize(weight)[0, :2], torch.tensor([-1.5, -0.5]) * scale)


@pytest.mark.parametrize("backend", ["avx512", "reference"])
def test_packing_copies(backend: str):
    weight = random_linear(Case(1, 16, 64, 16))
    packed = ops.pack(weight, backend)
    before = packed.blob.clone()
    ops.unpack(packed).codes.fill_(0)
    weight.codes.fill_(0)
    assert torch.equal(packed.blob, before)
