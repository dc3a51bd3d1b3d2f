"""Loops of group normalisation with SiLU, compiled by numba: on a CPU what lies between convolutions costs as much as they do.

Activations are rows of `c` channels a cell, of float32 or of bfloat16 as numba sees it, uint16. A sample is cut into pieces, all
samples alike, of which each thread takes the next: its numbers depend neither on the threads nor on what else is in the batch.
Tables of a channel are repeated to the length of a few cells: inner loops are long, and become vector code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from shapediff.models import openmp

CELLS_A_PIECE = 1024
"""At least, where a sample has them."""
ROW = 512
"""About how many numbers an inner loop runs over."""
NUMBERS_OF_TWO = 1 << 16
"""From how many numbers on a second thread is worth the call."""
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


@intrinsic
def _at(typing_context, address):  # type: ignore[no-untyped-def]
    """The pointer to this address, an int64."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@intrinsic
def _taken(typing_context, address):  # type: ignore[no-untyped-def]
    """The int64 at this address, which is one more afterwards: no two threads get the same."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.int64(types.int64), code


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
def _sum_up(x, tables, sums, turn):  # type: ignore[no-untyped-def]
    """Sums over the cells of each piece of x (samples, pieces, m): of x - shift, and of its square."""
    shift, (samples, pieces, m), width, c = tables[0], x.shape, tables.shape[2], sums.shape[3]
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    k = _taken(turn)
    while k < samples * pieces:
        i, p, num_rows = k // pieces, k % pieces, m // width
        for block in range(0, num_rows, ROWS_A_SUM):
            first[:], second[:] = 0, 0
            for r in range(block, min(block + ROWS_A_SUM, num_rows)):
                row = x[i, p, r * width : (r + 1) * width]
                for j in range(width):
                    d = _load(row[j]) - shift[i, j]
                    first[j] += d
                    second[j] += d * d
            for j in range(width):
                sums[0, i, p, j % c] += first[j]
                sums[1, i, p, j % c] += second[j]
        k = _taken(turn)


@njit(**_LOOP)
def _apply(x, tables, y, silu, turn):  # type: ignore[no-untyped-def]
    """y = gain x + offset, through SiLU if asked."""
    gain, offset, (samples, pieces, m), width = tables[0], tables[1], x.shape, tables.shape[2]
    k = _taken(turn)
    while k < samples * pieces:
        i, p = k // pieces, k % pieces
        for r in range(m // width):
            row, out = x[i, p, r * width : (r + 1) * width], y[i, p, r * width : (r + 1) * width]
            if silu:
                for j in range(width):
                    u = _load(row[j]) * gain[i, j] + offset[i, j]
                    _store(out, j, u * _sigmoid(u))
            else:
                for j in range(width):
                    _store(out, j, _load(row[j]) * gain[i, j] + offset[i, j])
        k = _taken(turn)


@njit(**_LOOP)
def _sum_back(x, dy, tables, sums, silu, turn):  # type: ignore[no-untyped-def]
    """Sums over cells of du, the gradient of u = gain x + offset, and of du (x - shift)."""
    gain, offset, shift = tables[0], tables[1], tables[2]
    (samples, pieces, m), width, c = x.shape, tables.shape[2], sums.shape[3]
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    k = _taken(turn)
    while k < samples * pieces:
        i, p, num_rows = k // pieces, k % pieces, m // width
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
                sums[0, i, p, j % c] += first[j]
                sums[1, i, p, j % c] += second[j]
        k = _taken(turn)


@njit(**_LOOP)
def _apply_back(x, dy, tables, dx, silu, turn):  # type: ignore[no-untyped-def]
    """dx = gain du - slope x - level."""
    gain, offset, slope, level = tables[0], tables[1], tables[2], tables[3]
    (samples, pieces, m), width = x.shape, tables.shape[2]
    k = _taken(turn)
    while k < samples * pieces:
        i, p = k // pieces, k % pieces
        for r in range(m // width):
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
        k = _taken(turn)


_SUM_UP, _APPLY, _SUM_BACK, _APPLY_BACK = range(4)


@njit(**_LOOP)
def _do(loop, x, dy, out, tables, sums, silu, turn):  # type: ignore[no-untyped-def]
    if loop == _SUM_UP:
        _sum_up(x, tables, sums, turn)
    elif loop == _APPLY:
        _apply(x, tables, out, silu, turn)
    elif loop == _SUM_BACK:
        _sum_back(x, dy, tables, sums, silu, turn)
    else:
        _apply_back(x, dy, tables, out, silu, turn)


@cfunc(types.void(types.CPointer(types.int64)), cache=True)
def _work(job):  # type: ignore[no-untyped-def]
    """What a thread does: job is [the next piece, its own address, loop, silu, bytes a number, sizes, addresses]."""
    turn, loop, silu, bytes_each = job[1], job[2], job[3] != 0, job[4]
    samples, pieces, m, width, c = job[5], job[6], job[7], job[8], job[9]
    tables = carray(_at(job[10]), (4, samples, width), np.float32)
    sums = carray(_at(job[11]), (2, samples, pieces, c), np.float64)
    shape = (samples, pieces, m)
    if bytes_each == 2:
        x = carray(_at(job[12]), shape, np.uint16)
        dy = carray(_at(job[13]), shape, np.uint16)
        out = carray(_at(job[14]), shape, np.uint16)
        _do(loop, x, dy, out, tables, sums, silu, turn)
    else:
        x = carray(_at(job[12]), shape, np.float32)
        dy = carray(_at(job[13]), shape, np.float32)
        out = carray(_at(job[14]), shape, np.float32)
        _do(loop, x, dy, out, tables, sums, silu, turn)


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
    shift = x[:, :, 0, 0, 0].float().numpy()  # sums of what is far from 0 would lose the variance
    sums, squares = _sums(_SUM_UP, x, shift)
    n = x[0, 0].numel()
    means, squared = shift + sums / n, squares - sums**2 / n
    mean = _mean_of_group(means, num_groups)
    variance = _mean_of_group(squared / n + (means - mean) ** 2, num_groups)
    rstd = 1 / np.sqrt(variance + eps)
    gain = weight.numpy() * rstd
    _run(_APPLY, x, (gain, bias.numpy() - mean * gain), out=y, silu=silu)
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
    centre, scale = mean.numpy(), rstd.numpy()
    gain = weight.numpy() * scale
    offset = bias.numpy() - centre * gain
    d_bias, products = _sums(_SUM_BACK, x, gain, offset, centre, dy=dy, silu=silu)
    d_weight = (products + (centre.astype(np.float32) - centre) * d_bias) * scale  # the loops' centre is rounded
    n = x[0, 0].numel()
    slope = scale**2 * _mean_of_group(weight.numpy() * d_weight / n, num_groups)
    level = scale * _mean_of_group(weight.numpy() * d_bias / n, num_groups) - centre * slope
    _run(_APPLY_BACK, x, (gain, offset, slope, level), dy=dy, out=dx, silu=silu)
    return torch.from_numpy(d_weight), torch.from_numpy(d_bias)


def _sums(loop: int, x: Tensor, *values: np.ndarray, dy: Tensor | None = None, silu: bool = False) -> np.ndarray:
    """Both sums of a loop, (2, b, c)."""
    sums = np.zeros((2, len(x), _num_pieces(x[0, 0].numel()), x.shape[1]))
    _run(loop, x, values, sums=sums, dy=dy, silu=silu)
    return sums.sum(2)


def _run(
    loop: int,
    x: Tensor,
    values: Sequence[np.ndarray],
    *,
    sums: np.ndarray | None = None,
    dy: Tensor | None = None,
    out: Tensor | None = None,
    silu: bool = False,
) -> None:
    b, c, num_cells = *x.shape[:2], x[0, 0].numel()
    pieces = _num_pieces(num_cells)
    times = _times(c, num_cells // pieces)
    tables = np.empty((4, b, times * c), np.float32)
    for table, value in zip(tables, values, strict=False):
        table.reshape(b, times, c)[:] = value[:, None]
    addresses = (0 if value is None else value.data_ptr() for value in (x, dy, out))
    sizes = (b, pieces, c * num_cells // pieces, times * c, c)
    sums_address = 0 if sums is None else sums.ctypes.data
    job = np.array([0, 0, loop, silu, x.itemsize, *sizes, tables.ctypes.data, sums_address, *addresses], np.int64)
    job[1] = job.ctypes.data
    openmp.run(_work, job, min(torch.get_num_threads(), b * pieces) if x.numel() >= NUMBERS_OF_TWO else 1)


@lru_cache
def _num_pieces(num_cells: int) -> int:
    """Into how many equal pieces the cells of a sample are cut."""
    return next(n for n in range(max(num_cells // CELLS_A_PIECE, 1), 0, -1) if num_cells % n == 0)


@lru_cache
def _times(c: int, num_cells: int) -> int:
    """How often a table of c channels is repeated: to about ROW numbers, of which the cells of a piece are a multiple."""
    times = 1
    while 2 * times * c <= ROW and num_cells % (2 * times) == 0:
        times *= 2
    return times


def _mean_of_group(value: np.ndarray, num_groups: int) -> np.ndarray:
    """(b, c): the mean over the channels of each group, at each of them."""
    size = value.shape[1] // num_groups
    return value.reshape(len(value), num_groups, size).mean(2).repeat(size, 1)
