"""Quantize one group of linears that share their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import ops
from engine.quantize.gptq import gptq_int4
from engine.quantize.lowrank import low_rank
from engine.quantize.nvfp4 import round_nvfp4
from engine.quantize.rounding import GROUP, pack_nibbles, round_affine, round_int4
from engine.quantize.smooth import candidates

_GPTQ_ROUNDS = 3

__all__ = ["Inputs", "Quantized", "Recipe", "quantize_group", "quantize_weight_only"]


@dataclass(frozen=True)
class Recipe:
    """How to quantize: 4-bit type, rank, smoothing strengths to try, refinement rounds, stored 16-bit type.

    `gptq` rounds INT4 residuals by GPTQ once branch and rounding have settled.
    """

    precision: Literal["int4", "nvfp4"] = "int4"
    rank: int = 32
    alphas: tuple[float, ...] = (0.3, 0.5, 0.7)
    rounds: int = 8
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    damping: float = 0.01
    gptq: bool = True


@dataclass(frozen=True)
class Inputs:
    """What a group of linears saw in calibration: sampled rows (S, K) and the largest magnitude a channel (K)."""

    rows: Tensor
    largest: Tensor

    @classmethod
    def unknown(cls, k: int, device: torch.device) -> Inputs:
        """Stand-in without calibration data: every channel alike."""
        return cls(torch.eye(k, device=device) * k**0.5, torch.ones(k, device=device))


@dataclass(frozen=True)
class Quantized:
    """Canonical tensors of one group of linears (rows stacked) and the relative output errors they cause.

    `error` is that with 4-bit, `error_w4a8` that with 8-bit activations.
    """

    linear: ops.CanonicalLinear
    error: float
    error_w4a8: float


def quantize_group(weight: Tensor, inputs: Inputs, recipe: Recipe, *, unsigned: bool = False) -> Quantized:
    """SVDQuant for `weight` (N, K): pick the smooth factor with the least output error, then refine its branch.

    `unsigned` says that the input is a GELU output. The error is ||y - y_hat|| / ||y|| on the sampled rows with
    4-bit activations. Where K is no multiple of 64 the result is wider by inputs
    that count for nothing.
    """
    missing = -weight.shape[1] % GROUP
    if missing:
        wide = Inputs(F.pad(inputs.rows, (0, missing)), F.pad(inputs.largest, (0, missing)))
        return quantize_group(F.pad(weight, (0, missing)), wide, recipe, unsigned=unsigned)
    weight = weight.float()
    best: tuple[float, Tensor] | None = None
    for smooth in candidates(weight, inputs.largest, recipe.alphas, recipe.dtype):
        trial = _branch_and_round(weight, smooth, inputs, recipe, rounds=1)
        error = _output_error(weight, trial, inputs.rows, _seen_in_4_bits(inputs.rows, smooth, unsigned))
        if best is None or error < best[0]:
            best = (error, smooth)
    assert best is not None
    linear = _branch_and_round(weight, best[1], inputs, recipe, rounds=recipe.rounds)
    return Quantized(
        linear,
        _output_error(weight, linear, inputs.rows, _seen_in_4_bits(inputs.rows, best[1], unsigned)),
        _output_error(weight, linear, inputs.rows, _seen_in_8_bits(inputs.rows, best[1])),
    )


def quantize_weight_only(weight: Tensor, inputs: Inputs, recipe: Recipe) -> tuple[ops.AwqWeight, float]:
    """Round `weight` (N, K) for 16-bit activations; returns it with its relative output error on the sampled rows."""
    weight = weight.float()
    codes, scales, zeros, rounded = round_affine(weight, inputs.rows.float().square().mean(0), recipe.dtype)
    value = ops.AwqWeight(codes=pack_nibbles(codes), scales=scales, zeros=zeros, bias=None)
    return value, _relative(inputs.rows @ (weight - rounded).T, inputs.rows @ weight.T)


def _branch_and_round(
    weight: Tensor, smooth: Tensor, inputs: Inputs, recipe: Recipe, rounds: int
) -> ops.CanonicalLinear:
    """Alternate between the branch that best explains what rounding loses and rounding what the branch leaves."""
    target = weight * smooth
    rows = inputs.rows.float() / smooth
    importance = rows.square().mean(0)
    root = _second_moment_root(rows, recipe.damping)
    rounded = torch.zeros_like(target)
    best: tuple[dict[str, Tensor], Tensor, Tensor] | None = None
    least = float("inf")
    for _ in range(rounds):
        up, down = _store(*low_rank(target - rounded, recipe.rank, root, recipe.seed), smooth, recipe.dtype)
        stored, rounded = _round(target - up @ (down * smooth), importance, recipe)
        error = float(((target - rounded - up @ (down * smooth)) @ root).norm())
        if error < least:
            least, best = error, (stored, up, down)
    assert best is not None
    if recipe.gptq and recipe.precision == "int4" and rounds > 1:
        best = _with_gptq(target, root, importance, smooth, recipe, best, least)
    stored, up, down = best
    return ops.CanonicalLinear(
        **stored,
        smooth=smooth.to(recipe.dtype),
        lora_down=down.to(recipe.dtype) if recipe.rank else None,
        lora_up=up.to(recipe.dtype) if recipe.rank else None,
        bias=None,
    )


_Branch = tuple[dict[str, Tensor], Tensor, Tensor]  # stored residual, up, down


def _with_gptq(
    target: Tensor, root: Tensor, importance: Tensor, smooth: Tensor, recipe: Recipe, best: _Branch, least: float
) -> _Branch:
    """Round what the best branch leaves by GPTQ, fit the branch to that once more, and keep what is better."""
    up, down = best[1:]
    for _ in range(_GPTQ_ROUNDS):
        branch = up @ (down * smooth)
        codes, scales, rounded = gptq_int4(target - branch, root, importance, recipe.dtype)
        error = float(((target - rounded - branch) @ root).norm())
        if error >= least:
            break
        least, best = error, ({"codes": pack_nibbles(codes), "wscales": scales}, up, down)
        if not recipe.rank:
            break
        up, down = _store(*low_rank(target - rounded, recipe.rank, root, recipe.seed), smooth, recipe.dtype)
    return best


def _round(residual: Tensor, importance: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    """Round what the branch leaves; returns the tensors to store and the value they stand for."""
    if recipe.precision == "nvfp4":
        codes, scales, tensor_scale, rounded = round_nvfp4(residual, importance, recipe.dtype)
        return {"codes": pack_nibbles(codes), "wscales": scales, "wtscale": tensor_scale}, rounded
    codes, scales, rounded = round_int4(residual, importance, recipe.dtype)
    return {"codes": pack_nibbles(codes), "wscales": scales}, rounded


def _store(up: Tensor, down: Tensor, smooth: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round the factors as the file will hold them; `down` then applies to the raw input, before smoothing."""
    return up.to(dtype).float(), (down / smooth).to(dtype).float()


def _second_moment_root(rows: Tensor, damping: float) -> Tensor:
    """Lower-triangular root (K, K) of the damped second moment of `rows` (S, K)."""
    moment = rows.T @ rows / len(rows)
    moment.diagonal().add_(damping * moment.diagonal().mean() + 1e-12)
    return torch.linalg.cholesky(moment)


def _output_error(weight: Tensor, linear: ops.CanonicalLinear, rows: Tensor, seen: Tensor) -> float:
    """Relative output error on `rows` (S, K), of which the 4-bit weights see `seen` and the branch all."""
    rows = rows.float()
    output = seen @ ops.dequantize(linear).T
    if linear.lora_down is not None and linear.lora_up is not None:
        output = output + (rows @ linear.lora_down.float().T) @ linear.lora_up.float().T
    exact = rows @ weight.T
    return _relative(output - exact, exact)


def _seen_in_4_bits(rows: Tensor, smooth: Tensor, unsigned: bool) -> Tensor:
    """What a layer with 4-bit activations sees of `rows`: smoothed, rounded in groups of 64, and scaled back."""
    shift = ops.GELU_SHIFT if unsigned else 0.0
    low, high = (0, 15) if unsigned else (-7, 7)
    groups = ((rows.float() + shift) / smooth).unflatten(-1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / high
    rounded = (groups / scale).round().clamp(low, high) * scale
    return rounded.flatten(-2) - shift / smooth


def _seen_in_8_bits(rows: Tensor, smooth: Tensor) -> Tensor:
    """What a layer with 8-bit activations sees of `rows`: smoothed, rounded to integers a row, and scaled back."""
    smoothed = rows.float() / smooth
    scale = smoothed.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (smoothed / scale).round() * scale


def _relative(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm().clamp_min(1e-12))
