"""Quantize one group of linears that share their input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import ops
from engine.quantize.gptq import error_spread, gptq_int4
from engine.quantize.inputs import Inputs, weigh
from engine.quantize.lowrank import factors
from engine.quantize.nvfp4 import TOPS, round_nvfp4
from engine.quantize.rounding import GROUP, pack_nibbles, round_affine, round_int4
from engine.quantize.smooth import candidates

_GPTQ_ROUNDS = 3

__all__ = ["Inputs", "Quantized", "Recipe", "output_errors", "quantize_group", "quantize_weight_only"]


@dataclass(frozen=True)
class Recipe:
    """How to quantize: 4-bit type, rank, smoothing strengths to try, refinement rounds, stored 16-bit type.

    Each stage can be left out (docs/quantize.md has what each gains): no `alphas`, a `rank` of 0, one of the `rounds`,
    and these. `search` tries several scales for each group of weights; else its largest value is the largest code.
    `four_over_six` lets NVFP4 groups map their largest value to 4 or 5 instead of 6. `shift` moves GELU outputs up
    until none is negative, so that 4-bit activations have codes 0..15. `gptq` rounds INT4 residuals by GPTQ once branch
    and rounding have settled.

    `damping`, in mean squares of an input, is added to the square of each: a sample of inputs is not all of them, and
    with little damping branch and GPTQ fit the sample at the cost of all other inputs.
    """

    precision: Literal["int4", "nvfp4"] = "int4"
    rank: int = 32
    alphas: tuple[float, ...] = (0.3, 0.5, 0.7)
    rounds: int = 8
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    damping: float = 0.5
    gptq: bool = True
    search: bool = True
    four_over_six: bool = True
    shift: bool = True


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
    4-bit activations; without rows it is that of the weight. Where K is no multiple of 64 the result is wider by
    inputs that count for nothing.
    """
    missing = -weight.shape[1] % GROUP
    if missing:
        return quantize_group(F.pad(weight, (0, missing)), inputs.padded(missing), recipe, unsigned=unsigned)
    weight = weight.float()
    best: tuple[float, _Task] | None = None
    for smooth in candidates(weight, inputs.largest, recipe.alphas, recipe.dtype):
        task = _Task.of(weight, smooth, inputs, recipe)
        trial = _branch_and_round(task, recipe, rounds=1)
        error = _output_error(weight, trial, inputs, lambda rows, _s=smooth: _seen_in_4_bits(rows, _s, unsigned))
        if best is None or error < best[0]:
            best = (error, task)
    assert best is not None
    linear = _branch_and_round(best[1], recipe, rounds=recipe.rounds)
    return Quantized(linear, *output_errors(weight, linear, inputs, unsigned=unsigned))


def output_errors(
    weight: Tensor, linear: ops.CanonicalLinear, inputs: Inputs, *, unsigned: bool = False
) -> tuple[float, float]:
    """Errors ||y - y_hat|| / ||y|| that `linear` makes of `weight` (N, K) on the rows of `inputs`, W4A4 and W4A8."""
    assert linear.smooth is not None
    smooth = linear.smooth.float()
    return (
        _output_error(weight, linear, inputs, lambda rows: _seen_in_4_bits(rows, smooth, unsigned)),
        _output_error(weight, linear, inputs, lambda rows: _seen_in_8_bits(rows, smooth)),
    )


def quantize_weight_only(weight: Tensor, inputs: Inputs, recipe: Recipe) -> tuple[ops.AwqWeight, float]:
    """Round `weight` (N, K) for 16-bit activations; returns it with its relative output error on the sampled rows."""
    weight = weight.float()
    codes, scales, zeros, rounded = round_affine(weight, inputs.mean_square(), recipe.dtype, search=recipe.search)
    value = ops.AwqWeight(codes=pack_nibbles(codes), scales=scales, zeros=zeros, bias=None)
    if inputs.rows is None:
        return value, _relative(weight - rounded, weight)
    return value, _relative(inputs.rows @ (weight - rounded).T, inputs.rows @ weight.T)


@dataclass(frozen=True)
class _Task:
    """A smoothed weight `target` (N, K), and what errors in it cost: `importance` (K) and `root` of the inputs."""

    target: Tensor
    smooth: Tensor
    importance: Tensor
    root: Tensor

    @classmethod
    def of(cls, weight: Tensor, smooth: Tensor, inputs: Inputs, recipe: Recipe) -> _Task:
        return cls(weight * smooth, smooth, *inputs.moments(smooth, recipe.damping))


def _branch_and_round(task: _Task, recipe: Recipe, rounds: int) -> ops.CanonicalLinear:
    """Alternate between the branch that best explains what rounding loses and rounding what the branch leaves."""
    best: _Branch | None = None
    least = float("inf")
    weighed = weigh(task.target, task.root)
    for _ in range(rounds):
        up, down = _fit(weighed, task, recipe)
        smoothed = down * task.smooth
        stored, rounded = _round(task.target - up @ smoothed, task.importance, recipe)
        # What rounding loses, by its effect: this round is judged by it, and the next branch is fitted to it.
        weighed = weigh(task.target - rounded, task.root)
        error = _left(weighed, up, smoothed, task)
        if error < least:
            least, best = error, (stored, up, down)
    assert best is not None
    # A diagonal root says that no input can make up for another.
    if recipe.gptq and recipe.precision == "int4" and rounds > 1 and task.root.ndim == 2:
        best = _with_gptq(task, recipe, best, least)
    stored, up, down = best
    return ops.CanonicalLinear(
        **stored,
        smooth=task.smooth.to(recipe.dtype),
        lora_down=down.to(recipe.dtype) if recipe.rank else None,
        lora_up=up.to(recipe.dtype) if recipe.rank else None,
        bias=None,
    )


_Branch = tuple[dict[str, Tensor], Tensor, Tensor]  # stored residual, up, down


def _with_gptq(task: _Task, recipe: Recipe, best: _Branch, least: float) -> _Branch:
    """Round what the best branch leaves by GPTQ, fit the branch to that once more, and keep what is better."""
    up, down = best[1:]
    spread = error_spread(task.root)
    for _ in range(_GPTQ_ROUNDS):
        smoothed = down * task.smooth
        residual = task.target - up @ smoothed
        codes, scales, rounded = gptq_int4(
            residual, task.root, task.importance, recipe.dtype, spread, search=recipe.search
        )
        weighed = weigh(task.target - rounded, task.root)
        error = _left(weighed, up, smoothed, task)
        if error >= least:
            break
        least, best = error, ({"codes": pack_nibbles(codes), "wscales": scales}, up, down)
        if not recipe.rank:
            break
        up, down = _fit(weighed, task, recipe)
    return best


def _fit(weighed: Tensor, task: _Task, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The branch for what rounding loses, its factors rounded as the file will hold them.

    `down` applies to the raw input, before smoothing.
    """
    up, down = factors(weighed, recipe.rank, task.root, recipe.seed)
    return up.to(recipe.dtype).float(), (down / task.smooth).to(recipe.dtype).float()


def _left(weighed: Tensor, up: Tensor, smoothed: Tensor, task: _Task) -> float:
    """Size of what branch and rounding together lose."""
    return float((weighed - up @ weigh(smoothed, task.root)).norm())


def _round(residual: Tensor, importance: Tensor, recipe: Recipe) -> tuple[dict[str, Tensor], Tensor]:
    """Round what the branch leaves; returns the tensors to store and the value they stand for."""
    if recipe.precision == "nvfp4":
        tops = TOPS if recipe.four_over_six else TOPS[:1]
        codes, scales, tensor_scale, rounded = round_nvfp4(residual, importance, recipe.dtype, tops)
        return {"codes": pack_nibbles(codes), "wscales": scales, "wtscale": tensor_scale}, rounded
    codes, scales, rounded = round_int4(residual, importance, recipe.dtype, search=recipe.search)
    return {"codes": pack_nibbles(codes), "wscales": scales}, rounded


def _output_error(
    weight: Tensor, linear: ops.CanonicalLinear, inputs: Inputs, see: Callable[[Tensor], Tensor]
) -> float:
    """Relative output error on the sampled rows, of which the 4-bit weights see `see(rows)` and the branch all.

    Without rows every input channel counts alike and activations are exact.
    """
    dense = ops.dequantize(linear)
    up = None if linear.lora_up is None else linear.lora_up.float()
    down = None if linear.lora_down is None else linear.lora_down.float()
    if inputs.rows is None:
        assert linear.smooth is not None
        whole = dense / linear.smooth.float()
        return _relative((whole if up is None or down is None else whole + up @ down) - weight, weight)
    rows = inputs.rows.float()
    output = see(rows) @ dense.T
    if up is not None and down is not None:
        output = output + (rows @ down.T) @ up.T
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
