"""Loops of group normalisation with SiLU, compiled by numba: on a CPU what lies between convolutions costs as much as they do.

Activations are rows of `c` channels a cell, of float32 or of bfloat16 as numba sees it, uint16. A sample is cut into pieces, all
samples alike: its numbers do not depend on what else is in the batch. Arrays of a channel are repeated to the
length of a few cells: inner loops are long, and become vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

CELLS_A_PIECE = 4096
ROW = 512
"""About how many numbers an inner loop runs over."""
ROWS_A_SUM = 64
"""Rows that are summed up in float32, before the sums go to float64."""

_INT, _FLOAT = ir.IntType(32), ir.FloatType()
_LOOP = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "arcp", "nsz", "reassoc"}}


@intrinsic
def _widened(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 whose upper half is this uint16."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(types.uint16), code


@intrinsic
def _rounded(typing_context, value):  # type: ignore[no-untyped-def]
    """The bfloat16 next to this float32, ties to even, as uint16."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits = builder.bitcast(args[0], _INT)
        odd = builder.and_(builder.lshr(bits, _INT(16)), _INT(1))
        nearest = builder.add(bits, builder.add(odd, _INT(0x7FFF)))
        return builder.trunc(builder.lshr(nearest, _INT(16)), ir.IntType(16))

    return types.uint16(types.float32), code


@intrinsic
def _split(typing_context, value):  # type: ignore[no-untyped-def]
    """(n, 2^n) as float32 for the whole number n, -126 to 126, that is nearest to this float32."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        above = builder.fptosi(builder.fadd(args[0], _FLOAT(128.5)), _INT)
        n = builder.add(above, _INT(-128))
        power = builder.bitcast(builder.shl(builder.add(n, _INT(127)), _INT(23)), _FLOAT)
        return context.make_tuple(builder, signature.return_type, [builder.sitofp(n, _FLOAT), power])

    return types.UniTuple(types.float32, 2)(types.float32), code


def _load(value: Any) -> Any: ...


@overload(_load, inline="always")
def _load_of(value):  # type: ignore[no-untyped-def]
    return (lambda value: _widened(value)) if value == types.uint16 else (lambda value: value)


def _store(out: Any, i: Any, value: Any) -> Any: ...


@overload(_store, inline="always")
def _store_of(out, i, value):  # type: ignore[no-untyped-def]
    def rounded(out, i, value):  # type: ignore[no-untyped-def]
        out[i] = _rounded(value)

    def whole(out, i, value):  # type: ignore[no-untyped-def]
        out[i] = value

    return rounded if out.dtype == types.uint16 else whole


@njit(inline="always", error_model="numpy")
def _sigmoid(u):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-u)) to a few units in the last place: 2^y by the bits of its exponent, and a polynomial for the rest."""
    one = np.float32(1)
    y = min(max(u * np.float32(-1.4426950408889634), np.float32(-126)), np.float32(126))
    n, power = _split(y)
    f = y - n
    p = np.float32(1.535336188319500e-4)
    p = p * f + np.float32(1.339887440266574e-3)
    p = p * f + np.float32(9.618437357674640e-3)
    p = p * f + np.float32(5.550332471162809e-2)
    p = p * f + np.float32(2.402264791363012e-1)
    p = p * f + np.float32(6.931472028550421e-1)
    p = p * f + one
    return one / (one + p * power)


@njit(inline="always", error_model="numpy")
def _through_silu(u, dy):  # type: ignore[no-untyped-def]
    """dy times the slope of u sigmoid(u)."""
    s = _sigmoid(u)
    return dy * s * (np.float32(1) + u * (np.float32(1) - s))


@njit(**_LOOP)
def _sum_up(x, shift, c, sums, squares):  # type: ignore[no-untyped-def]
    """Sums over the cells of each piece of x (samples, pieces, m): of x - shift, and of its square, (.., .., c)."""
    pieces, width = x.shape[1], shift.shape[1]
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(x.shape[0] * pieces):
        i, p = k // pieces, k % pieces
        num_rows = x.shape[2] // width
        for block in range(0, num_rows, ROWS_A_SUM):
            first[:], second[:] = 0, 0
            for r in range(block, min(block + ROWS_A_SUM, num_rows)):
                row = x[i, p, r * width : (r + 1) * width]
                for j in range(width):
                    d = _load(row[j]) - shift[i, j]
                    first[j] += d
                    second[j] += d * d
            for j in range(width):
                sums[i, p, j % c] += first[j]
                squares[i, p, j % c] += second[j]


@njit(**_LOOP)
def _apply(x, gain, offset, y, silu):  # type: ignore[no-untyped-def]
    """y = gain x + offset, through SiLU if asked."""
    pieces, width = x.shape[1], gain.shape[1]
    for k in range(x.shape[0] * pieces):
        i, p = k // pieces, k % pieces
        for r in range(x.shape[2] // width):
            row, out = x[i, p, r * width : (r + 1) * width], y[i, p, r * width : (r + 1) * width]
            if silu:
                for j in range(width):
                    u = _load(row[j]) * gain[i, j] + offset[i, j]
                    _store(out, j, u * _sigmoid(u))
            else:
                for j in range(width):
                    _store(out, j, _load(row[j]) * gain[i, j] + offset[i, j])


@njit(**_LOOP)
def _sum_back(x, dy, gain, offset, shift, c, silu, sums, products):  # type: ignore[no-untyped-def]
    """Sums over cells of du, the gradient of u = gain x + offset, and of du (x - shift)."""
    pieces, width = x.shape[1], gain.shape[1]
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(x.shape[0] * pieces):
        i, p = k // pieces, k % pieces
        num_rows = x.shape[2] // width
        for block in range(0, num_rows, ROWS_A_SUM):
            first[:], second[:] = 0, 0
            for r in range(block, min(block + ROWS_A_SUM, num_rows)):
                row, d = x[i, p, r * width : (r + 1) * width], dy[i, p, r * width : (r + 1) * width]
                if silu:
                    for j in range(width):
                        v = _load(row[j])
                        du = _through_silu(v * gain[i, j] + offset[i, j], _load(d[j]))
                        first[j] += du
                        second[j] += du * (v - shift[i, j])
                else:
                    for j in range(width):
                        du = _load(d[j])
                        first[j] += du
                        second[j] += du * (_load(row[j]) - shift[i, j])
            for j in range(width):
                sums[i, p, j % c] += first[j]
                products[i, p, j % c] += second[j]


@njit(**_LOOP)
def _apply_back(x, dy, gain, offset, slope, level, dx, silu):  # type: ignore[no-untyped-def]
    """dx = gain du - slope x - level."""
    pieces, width = x.shape[1], gain.shape[1]
    for k in range(x.shape[0] * pieces):
        i, p = k // pieces, k % pieces
        for r in range(x.shape[2] // width):
            row, d = x[i, p, r * width : (r + 1) * width], dy[i, p, r * width : (r + 1) * width]
            out = dx[i, p, r * width : (r + 1) * width]
            if silu:
                for j in range(width):
                    v = _load(row[j])
                    du = _through_silu(v * gain[i, j] + offset[i, j], _load(d[j]))
                    _store(out, j, du * gain[i, j] - v * slope[i, j] - level[i, j])
            else:
                for j in range(width):
                    _store(out, j, _load(d[j]) * gain[i, j] - _load(row[j]) * slope[i, j] - level[i, j])


@np.errstate(invalid="ignore", over="ignore")  # what is not finite shows in the loss
def forward(
    x: Tensor,
    y: Tensor,
    num_groups: int,
    weight: Float[Tensor, "b c"],
    bias: Float[Tensor, "b c"],
    eps: float,
    *,
    silu: bool,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Fill y, like x (b, c, x, y, z) with channels last; returns mean and 1 / sd of each sample's groups, at their channels."""
    c, rows, out = x.shape[1], _rows(x), _rows(y)
    shift = rows[:, 0, :c].copy()  # sums of what is far from 0 would lose the variance
    shift = (shift.astype(np.uint32) << 16).view(np.float32) if shift.dtype == np.uint16 else shift
    sums, squares = np.zeros((2, *rows.shape[:2], c))
    _sum_up(rows, _repeated(shift, rows), c, sums, squares)
    n = x[0, 0].numel()
    means, squared = shift + sums.sum(1) / n, squares.sum(1) - sums.sum(1) ** 2 / n
    mean = _mean_of_group(means, num_groups)
    variance = _mean_of_group(squared / n + (means - mean) ** 2, num_groups)
    rstd = 1 / np.sqrt(variance + eps)
    gain = weight.numpy() * rstd
    offset = bias.numpy() - mean * gain
    _apply(rows, _repeated(gain, rows), _repeated(offset, rows), out, silu)
    return torch.from_numpy(mean), torch.from_numpy(rstd)


@np.errstate(invalid="ignore", over="ignore")
def backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    num_groups: int,
    weight: Float[Tensor, "b c"],
    bias: Float[Tensor, "b c"],
    mean: Float[Tensor, "b c"],
    rstd: Float[Tensor, "b c"],
    *,
    silu: bool,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Fill dx; returns the gradients of weight and bias, a sample and channel.

    With w = weight / sd and means over a group, dx = w du - mean(w du) - x_hat mean(w du x_hat).
    """
    c, rows = x.shape[1], _rows(x)
    centre, scale = mean.numpy(), rstd.numpy()
    gain = weight.numpy() * scale
    offset = bias.numpy() - centre * gain
    wide_gain, wide_offset, shift = (_repeated(value, rows) for value in (gain, offset, centre))
    sums, products = np.zeros((2, *rows.shape[:2], c))
    _sum_back(rows, _rows(dy), wide_gain, wide_offset, shift, c, silu, sums, products)
    d_bias = sums.sum(1)
    d_weight = (products.sum(1) + (centre.astype(np.float32) - centre) * d_bias) * scale  # the loops' centre is rounded
    n = x[0, 0].numel()
    slope = scale**2 * _mean_of_group(weight.numpy() * d_weight / n, num_groups)
    level = scale * _mean_of_group(weight.numpy() * d_bias / n, num_groups) - centre * slope
    spread = (_repeated(slope, rows), _repeated(level, rows), _rows(dx))
    _apply_back(rows, _rows(dy), wide_gain, wide_offset, *spread, silu)
    return torch.from_numpy(d_weight), torch.from_numpy(d_bias)


def _rows(x: Tensor) -> np.ndarray:
    """(b, pieces, m), a view."""
    cells = x.detach().permute(0, 2, 3, 4, 1).flatten(1)
    values = cells.view(torch.uint16) if x.dtype == torch.bfloat16 else cells
    num_cells = x[0, 0].numel()
    pieces = num_cells // CELLS_A_PIECE if num_cells % CELLS_A_PIECE == 0 else 1
    return values.numpy().reshape(len(x), pieces, -1)


def _repeated(value: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(b, c) as float32, again and again: to about ROW numbers, of which the rows of each piece are a multiple."""
    times, cells = 1, rows.shape[2] // value.shape[1]
    while 2 * times * value.shape[1] <= ROW and cells % (2 * times) == 0:
        times *= 2
    return np.tile(value.astype(np.float32), (1, times))


def _mean_of_group(value: np.ndarray, num_groups: int) -> np.ndarray:
    """(b, c): the mean over the channels of each group, at each of them."""
    size = value.shape[1] // num_groups
    return value.reshape(len(value), num_groups, size).mean(2).repeat(size, 1)
