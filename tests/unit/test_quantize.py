"""Each stage of the quantizer earns its place on data where its effect is known."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.quantize.layer import Inputs, Recipe, quantize_group, quantize_weight_only
from engine.quantize.lowrank import low_rank
from engine.quantize.nvfp4 import E2M1, round_nvfp4
from engine.quantize.rounding import pack_nibbles, round_affine, round_int4

N, K, S = 96, 128, 256
ONES = torch.ones(K)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=generator())


def outlier_inputs(size: float = 60.0) -> Inputs:
    rows = torch.randn(S, K, generator=generator(1))
    rows[:, ::37] *= size
    return Inputs(rows, rows.abs().amax(0))


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value - exact).norm() / exact.norm())


def test_int4_codes_and_scales_explain_the_rounded_weight(weight: torch.Tensor):
    codes, scales, rounded = round_int4(weight, ONES, torch.bfloat16)
    assert codes.min() >= -8
    assert codes.max() <= 7
    again = codes.float().unflatten(1, (-1, 64)) * scales.float()[..., None]
    assert torch.equal(again.flatten(1), rounded)
    assert relative(rounded, weight) < 0.11


def test_searching_the_clipping_ratio_beats_the_largest_value_rule(weight: torch.Tensor):
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-7, 7) * scale).flatten(1)
    _, _, searched = round_int4(weight, ONES, torch.float32)
    assert relative(searched, weight) < relative(plain, weight)


def test_important_channels_are_rounded_more_closely(weight: torch.Tensor):
    importance = ONES.clone()
    importance[:8] = 1000.0
    _, _, alike = round_int4(weight, ONES, torch.bfloat16)
    _, _, weighted = round_int4(weight, importance, torch.bfloat16)
    assert relative(weighted[:, :8], weight[:, :8]) < relative(alike[:, :8], weight[:, :8])


def test_zero_groups_stay_zero():
    weight = torch.zeros(4, K)
    codes, scales, rounded = round_int4(weight, ONES, torch.bfloat16)
    assert not codes.any()
    assert not rounded.any()
    assert scales.isfinite().all()


def test_affine_rounding_follows_an_offset():
    weight = torch.rand(N, K, generator=generator()) + 5
    codes, scales, zeros, rounded = round_affine(weight, ONES, torch.float32)
    assert codes.max() <= 15
    assert relative(rounded, weight) < 0.01
    again = codes.float().unflatten(1, (-1, 64)) * scales[..., None] + zeros[..., None]
    assert torch.allclose(again.flatten(1), rounded)


def test_nvfp4_values_are_those_of_the_type(weight: torch.Tensor):
    codes, scales, tensor_scale, rounded = round_nvfp4(weight, ONES, torch.bfloat16)
    assert scales.dtype is torch.float8_e4m3fn
    linear = ops.CanonicalLinear(codes=pack_nibbles(codes), wscales=scales, wtscale=tensor_scale)
    assert torch.allclose(ops.dequantize(linear), rounded, rtol=1e-6)
    units = (rounded.unflatten(1, (-1, 16)) / (scales.float()[..., None] * tensor_scale.float())).abs()
    table = torch.tensor(E2M1)
    assert (units.reshape(-1, 1) - table).abs().min(1).values.max() < 1e-4
    assert relative(rounded, weight) < 0.10


def test_low_rank_recovers_a_matrix_of_that_rank():
    factors = torch.randn(N, 8, generator=generator()), torch.randn(8, K, generator=generator(1))
    exact = factors[0] @ factors[1]
    up, down = low_rank(exact, 8, torch.eye(K))
    assert relative(up @ down, exact) < 1e-4


def test_low_rank_puts_its_rank_where_the_input_is(weight: torch.Tensor):
    rows = outlier_inputs().rows
    moment = rows.T @ rows / S + 0.01 * torch.eye(K)
    seen, blind = low_rank(weight, 8, torch.linalg.cholesky(moment)), low_rank(weight, 8, torch.eye(K))
    errors = [relative(rows @ (up @ down).T, rows @ weight.T) for up, down in (seen, blind)]
    assert errors[0] < errors[1]


def test_outliers_hurt_svdquant_less_than_plain_rounding(weight: torch.Tensor):
    inputs = outlier_inputs()
    plain = quantize_group(weight, inputs, Recipe(rank=0, alphas=(), rounds=1)).error
    smoothed = quantize_group(weight, inputs, Recipe(rank=0, rounds=1)).error
    full = quantize_group(weight, inputs, Recipe(rank=16, rounds=4)).error
    assert full < smoothed < plain
    assert full < 0.5 * plain


def test_refinement_does_not_hurt(weight: torch.Tensor):
    inputs = outlier_inputs()
    once = quantize_group(weight, inputs, Recipe(rank=16, rounds=1, alphas=())).error
    more = quantize_group(weight, inputs, Recipe(rank=16, rounds=6, alphas=())).error
    assert more <= once * 1.02


def test_the_same_input_gives_the_same_bits(weight: torch.Tensor):
    first, second = (quantize_group(weight, outlier_inputs(), Recipe(rank=16)).linear for _ in range(2))
    for name, value in vars(first).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(second, name)), name


def test_weight_only_reports_the_error_it_makes(weight: torch.Tensor):
    inputs = Inputs(torch.randn(S, K, generator=generator(2)), ONES)
    value, error = quantize_weight_only(weight, inputs, Recipe())
    exact = inputs.rows @ weight.T
    assert relative(inputs.rows @ ops.canonical.dequantize_awq(value).T, exact) == pytest.approx(error, rel=1e-3)
    assert error < 0.11


def test_a_folder_of_shards_has_the_same_bytes_again(tmp_path):
    from engine.checkpoint.files import write_shards

    draw = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randn(3 + i, 16, generator=draw) for i in range(6)}
    metadata = {f"key{i}": "x" * i for i in range(8)}
    for name in ("a", "b"):
        write_shards(tmp_path / name, tensors, metadata, max_bytes=800)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) > 2
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True))
