"""The Triton kernels of `fused.py`; importing this needs Triton.

Letters: ROWS rows of a tile, 64 columns, x the weights of a tile in float32, c the weight of an error in a column.
Rounding to the nearest, ties to even, is by adding 1.5 * 2**23 and taking it away, exact for the magnitudes up to 7
that codes are clamped to first.
"""

# Triton reads these functions' text: names are constants of the module, and every type is its own.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gptq_columns", "round_groups"]


@triton.jit
def _codes(x, scale):
    """Nearest codes -7..7 of x / scale."""
    near = tl.clamp(x / scale, -7.0, 7.0)
    return (near + 12582912.0) - 12582912.0


@triton.jit
def _stored(scale, TYPE: tl.constexpr):
    """The scale as the file will hold it; one for a group of zeros."""
    held = scale.to(TYPE).to(tl.float32)
    return tl.where(held > 0.0, held, 1.0)


@triton.jit
def _cost(x, c, scale):
    lost = x - _codes(x, scale[:, None]) * scale[:, None]
    return tl.sum(c[None, :] * lost * lost, 1)


@triton.jit
def _best_scale(x, c, TYPE: tl.constexpr):
    """Scales (ROWS) with the least weighted error: 13 clipping ratios from 0.70 to 1, then one fitted to the codes."""
    largest = tl.max(tl.abs(x), 1)
    best = _stored(largest * (0.70 / 7.0), TYPE)
    least = _cost(x, c, best)
    for step in tl.static_range(1, 13):
        scale = _stored(largest * ((0.70 + 0.025 * step) / 7.0), TYPE)
        cost = _cost(x, c, scale)
        best = tl.where(cost < least, scale, best)
        least = tl.minimum(cost, least)
    codes = _codes(x, best[:, None])
    over = tl.sum(c[None, :] * x * codes, 1)
    under = tl.sum(c[None, :] * codes * codes, 1)
    fitted = _stored(tl.where(under > 0.0, over / tl.where(under > 0.0, under, 1.0), best), TYPE)
    return tl.where(_cost(x, c, fitted) < least, fitted, best)


@triton.jit
def round_groups(weight, importance, codes, scales, rounded, n, k, ROWS: tl.constexpr):
    """Round a tile of rows and one group of 64 inputs; weight and rounded float32 (n, k), scales (n, k/64)."""
    group = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = group * 64 + tl.arange(0, 64)
    where = rows[:, None].to(tl.int64) * k + columns[None, :]
    inside = rows[:, None] < n
    x = tl.load(weight + where, mask=inside, other=0.0)
    c = tl.load(importance + columns)
    scale = _best_scale(x, c, scales.dtype.element_ty)
    q = _codes(x, scale[:, None])
    tl.store(codes + where, q.to(tl.int8), mask=inside)
    tl.store(rounded + where, q * scale[:, None], mask=inside)
    tl.store(scales + rows * (k // 64) + group, scale.to(scales.dtype.element_ty), mask=rows < n)


@triton.jit
def gptq_columns(weight, stride, spread, importance, codes, scales, errors, n, ROWS: tl.constexpr):
    """One group of GPTQ for a tile of rows: columns in turn, each making the later ones take up what it loses.

    weight float32 with `stride` between rows; spread (64, 64) upper triangular; codes and errors float32 (n, 64).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, 64)
    inside = rows[:, None] < n
    x = tl.load(weight + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
    scale = _best_scale(x, tl.load(importance + columns), scales.dtype.element_ty)
    q, lost = tl.zeros_like(x), tl.zeros_like(x)
    for j in range(64):
        row = tl.load(spread + j * 64 + columns)
        this = columns[None, :] == j
        column = tl.sum(tl.where(this, x, 0.0), 1)
        code = _codes(column, scale)
        error = (column - code * scale) / tl.sum(tl.where(columns == j, row, 0.0), 0)
        x -= error[:, None] * row[None, :]
        q = tl.where(this, code[:, None], q)
        lost = tl.where(this, error[:, None], lost)
    where = rows[:, None].to(tl.int64) * 64 + columns[None, :]
    tl.store(codes + where, q, mask=inside)
    tl.store(errors + where, lost, mask=inside)
    tl.store(scales + rows, scale.to(scales.dtype.element_ty), mask=rows < n)
