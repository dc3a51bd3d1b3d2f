"""Loops of group normalisation with SiLU, compiled by numba: on a CPU what lies between convolutions costs as much as they do.

Activations are rows of `c` channels a cell, of float32 or of bfloat16 as numba sees it, uint16. A sample is cut into pieces, all
samples alike, of which each thread takes the next: its numbers depend neither on the threads nor on what else is in the batch.
Values of a channel are repeated to a row of a few cells: inner loops are long, and become vector code.
"""

from __future__ import annotations

import math
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
_let_others_run = types.ExternalFunction("sched_yield", types.int32())
_LOOP = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"contract", "arcp", "nsz"}}


@intrinsic
def _widened(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 whose upper half is this uint16."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(types.uint16), code


@intrinsic
def _rounded(typing_context, value):  # type: ignore[no-untyped-def]
    """The bfloat16 next to this float32, of two the larger in size, as uint16."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        bits = builder.add(builder.bitcast(args[0], _INT), _INT(0x8000))
        return builder.trunc(builder.lshr(bits, _INT(16)), ir.IntType(16))

    return types.uint16(types.float32), code


@intrinsic
def _split(typing_context, value):  # type: ignore[no-untyped-def]
    """(n as float32, n at the place of a float32's exponent) for the whole number n, -126 to 126, nearest to this float32."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        whole = _FLOAT(1.5 * 2**23)  # the sum has no bits for fractions
        moved = builder.fadd(args[0], whole)
        exponent = builder.shl(builder.bitcast(moved, _INT), _INT(23))
        return context.make_tuple(builder, signature.return_type, [builder.fsub(moved, whole), exponent])

    return types.Tuple([types.float32, types.int32])(types.float32), code


@intrinsic
def _scaled(typing_context, value, exponent):  # type: ignore[no-untyped-def]
    """This float32, 0.5 to 2, times 2^n, n as `_split` gives it."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.add(builder.bitcast(args[0], _INT), args[1]), _FLOAT)

    return types.float32(types.float32, types.int32), code


@intrinsic
def _at(typing_context, address):  # type: ignore[no-untyped-def]
    """The pointer to this address, an int64."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@intrinsic
def _counted(typing_context, address, step):  # type: ignore[no-untyped-def]
    """The int64 at this address, to which `step` is added: one thread after another, and all that they did before is seen."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", counter, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), code


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


def _power(f: Any, like: Any) -> Any: ...


@overload(_power, inline="always")
def _power_for(f, like):  # type: ignore[no-untyped-def]
    """2^f, f in [-1/2, 1/2], to 1e-4 for bfloat16 and 1e-8 for float32, by the polynomials of least relative error."""

    def coarse(f, like):  # type: ignore[no-untyped-def]
        p = np.float32(0.0551716899)
        p = p * f + np.float32(0.242611174)
        p = p * f + np.float32(0.693260987)
        return p * f + np.float32(0.99992807)

    def fine(f, like):  # type: ignore[no-untyped-def]
        p = np.float32(1.535336188319500e-4)
        p = p * f + np.float32(1.339887440266574e-3)
        p = p * f + np.float32(9.618437357674640e-3)
        p = p * f + np.float32(5.550332471162809e-2)
        p = p * f + np.float32(2.402264791363012e-1)
        p = p * f + np.float32(6.931472028550421e-1)
        return p * f + np.float32(1)

    return coarse if like.dtype == types.uint16 else fine


@njit(inline="always", error_model="numpy")
def _sigmoid(u, like):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-u)), as exact as numbers of `like`: 2^y by the bits of its exponent, and a polynomial for the rest."""
    y = min(max(u * np.float32(-1.4426950408889634), np.float32(-126)), np.float32(126))
    n, exponent = _split(y)
    return np.float32(1) / (np.float32(1) + _scaled(_power(y - n, like), exponent))


@njit(inline="always", error_model="numpy")
def _through_silu(u, dy, like):  # type: ignore[no-untyped-def]
    """dy times the slope of u sigmoid(u)."""
    s = _sigmoid(u, like)
    return dy * s * (np.float32(1) + u * (np.float32(1) - s))


_ADDRESS, _SILU, _GROUPS, _WIDTH, _SAMPLES, _PIECES, _CELLS, _CHANNELS, _FIRST_CHANNELS, _ROWS, _EPS = range(3, 14)
_SUMS, _STATISTICS, _WEIGHT, _BIAS, _X, _BESIDE, _OUT, _OUT_BESIDE, _DY, _GRADIENTS = range(14, 24)
"""Where a job has its own address, sizes, and the addresses of arrays: int64, but for eps, a float64. Before them it counts."""
_FIRST, _SECOND, _DONE = 0, 8, 16
"""Where it counts the pieces that were taken in its two loops, and those done in the first: bytes from its start."""


@njit(**_LOOP)
def _last(counters, num):  # type: ignore[no-untyped-def]
    """The last of `num` pieces that no first loop has taken: the second begins with what the first read last, and caches hold."""
    return num - 1 - _counted(counters + _FIRST, 1)


@njit(**_LOOP)
def _wait(counters, num):  # type: ignore[no-untyped-def]
    """Until the first loop is done with all of `num` pieces, those that other threads took among them."""
    while _counted(counters + _DONE, 0) < num:
        _let_others_run()


@njit(**_LOOP)
def _normalise(  # type: ignore[no-untyped-def]
    x, beside, y, weight, bias, sums, statistics, groups, eps, silu, width, counters
):
    """y = (x - mean) / sd weight + bias, through SiLU if asked; statistics are mean and 1 / sd, of its group for each channel.

    The channels of y are those of x, then those `beside` it, if any. What is one to a channel is so to the numbers of a row:
    of x alone some cells, else one, of which x has the first `run`.
    """
    (samples, pieces, numbers), c = y.shape, statistics.shape[2]
    c_x = c * x.shape[2] // numbers
    run = width if c_x == c else c_x
    first, second, shift = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    of = -1
    k = _last(counters, samples * pieces)
    while k >= 0:
        i, p = k // pieces, k % pieces
        if i != of:
            of = i
            for j in range(width):  # sums of what is far from 0 would lose the variance
                shift[j] = _in_first_cell(x, beside, i, j % c, c_x)
        _sum_up(x[i, p], shift[:run], first[:run], second[:run], sums[:, i, p, :c_x])
        _sum_up(beside[i, p], shift[run:], first[run:], second[run:], sums[:, i, p, c_x:])
        _counted(counters + _DONE, 1)
        k = _last(counters, samples * pieces)
    _wait(counters, samples * pieces)
    gain, offset, of = first, second, -1
    k = _counted(counters + _SECOND, 1)
    while k < samples * pieces:
        i, p = k // pieces, k % pieces
        if i != of:
            of = i
            _set_statistics(x, beside, y, sums, i, groups, eps, statistics)
            _set_line(weight, bias, statistics, i, gain, offset)
        _map(x[i, p], y[i, p], width, gain[:run], offset[:run], silu)
        _map(beside[i, p], y[i, p, run:], width, gain[run:], offset[run:], silu)
        k = _counted(counters + _SECOND, 1)


@njit(**_LOOP)
def _sum_up(x, shift, first, second, sums):  # type: ignore[no-untyped-def]
    """Set sums (2, c) of a piece of x about `shift`, a row, and of their squares; `first` and `second` are for use in between."""
    width, c, num_rows = len(shift), sums.shape[1], len(x) // max(len(shift), 1)
    sums[:] = 0
    for block in range(0, num_rows, ROWS_A_SUM):
        first[:], second[:] = 0, 0
        for r in range(block, min(block + ROWS_A_SUM, num_rows)):
            row = x[r * width : (r + 1) * width]
            for j in range(width):
                d = _load(row[j]) - shift[j]
                first[j] += d
                second[j] += d * d
        for j in range(width):
            sums[0, j % c] += first[j]
            sums[1, j % c] += second[j]


@njit(**_LOOP)
def _map(x, y, step, gain, offset, silu):  # type: ignore[no-untyped-def]
    """y = gain x + offset, through SiLU if asked, of a piece; rows of y lie `step` numbers apart."""
    width = len(gain)
    for r in range(len(x) // max(width, 1)):
        row, out = x[r * width : (r + 1) * width], y[r * step : r * step + width]
        if silu:
            for j in range(width):
                u = _load(row[j]) * gain[j] + offset[j]
                _store(out, j, u * _sigmoid(u, row))
        else:
            for j in range(width):
                _store(out, j, _load(row[j]) * gain[j] + offset[j])


@njit(inline="always")
def _in_first_cell(x, beside, i, j, c_x):  # type: ignore[no-untyped-def]
    return _load(x[i, 0, j]) if j < c_x else _load(beside[i, 0, j - c_x])


@njit(**_LOOP)
def _set_statistics(x, beside, y, sums, i, groups, eps, statistics):  # type: ignore[no-untyped-def]
    """Of sample i, of the sums of its pieces; whichever thread does it, the same."""
    c = statistics.shape[2]
    size, n, c_x = c // groups, y.shape[1] * y.shape[2] / c, c * x.shape[2] // y.shape[2]
    means, squared = np.zeros(size), np.zeros(size)
    for group in range(groups):
        mean = variance = 0.0
        for j in range(size):
            total = square = 0.0
            for p in range(y.shape[1]):
                total += sums[0, i, p, group * size + j]
                square += sums[1, i, p, group * size + j]
            means[j] = _in_first_cell(x, beside, i, group * size + j, c_x) + total / n
            squared[j] = square - total * total / n
            mean += means[j] / size
        for j in range(size):
            variance += (squared[j] / n + (means[j] - mean) ** 2) / size
        for j in range(size):
            statistics[0, i, group * size + j] = mean
            statistics[1, i, group * size + j] = 1 / math.sqrt(max(variance, 0.0) + eps)  # rounded, it may be negative


@njit(**_LOOP)
def _normalise_back(  # type: ignore[no-untyped-def]
    x, beside, dy, dx, d_beside, weight, bias, sums, statistics, gradients, groups, silu, width, counters
):
    """The gradients of x, of what is beside it, and of weight and bias a sample.

    With w = weight / sd, du the gradient before SiLU and means over a group, dx = w du - mean(w du) - x_hat mean(w du x_hat).
    """
    (samples, pieces, numbers), c = dy.shape, statistics.shape[2]
    c_x = c * x.shape[2] // numbers
    run = width if c_x == c else c_x
    gain, offset = np.empty(width, np.float32), np.empty(width, np.float32)
    shift, level = np.empty(width, np.float32), np.empty(width, np.float32)
    first, second = np.empty(width, np.float32), np.empty(width, np.float32)
    of = -1
    k = _last(counters, samples * pieces)
    while k >= 0:
        i, p = k // pieces, k % pieces
        if i != of:
            of = i
            _set_line(weight, bias, statistics, i, gain, offset)
            for j in range(width):
                shift[j] = statistics[0, i, j % c]
        line = first[:run], second[:run], gain[:run], offset[:run], shift[:run]
        _sum_up_back(x[i, p], dy[i, p], width, *line, sums[:, i, p, :c_x], silu)
        line = first[run:], second[run:], gain[run:], offset[run:], shift[run:]
        _sum_up_back(beside[i, p], dy[i, p, run:], width, *line, sums[:, i, p, c_x:], silu)
        _counted(counters + _DONE, 1)
        k = _last(counters, samples * pieces)
    _wait(counters, samples * pieces)
    slope, of = shift, -1
    k = _counted(counters + _SECOND, 1)
    while k < samples * pieces:
        i, p = k // pieces, k % pieces
        if i != of:
            of = i
            _set_line(weight, bias, statistics, i, gain, offset)
            _set_gradients(dy, sums, i, groups, weight, statistics, gradients, slope, level)
        ends = gain[:run], offset[:run], slope[:run], level[:run]
        _map_back(x[i, p], dy[i, p], dx[i, p], width, *ends, silu)
        ends = gain[run:], offset[run:], slope[run:], level[run:]
        _map_back(beside[i, p], dy[i, p, run:], d_beside[i, p], width, *ends, silu)
        k = _counted(counters + _SECOND, 1)


@njit(**_LOOP)
def _sum_up_back(x, dy, step, first, second, gain, offset, shift, sums, silu):  # type: ignore[no-untyped-def]
    """Set sums (2, c) of a piece of du and of du (x - shift); rows of dy lie `step` numbers apart."""
    width, c, num_rows = len(gain), sums.shape[1], len(x) // max(len(gain), 1)
    sums[:] = 0
    for block in range(0, num_rows, ROWS_A_SUM):
        first[:], second[:] = 0, 0
        for r in range(block, min(block + ROWS_A_SUM, num_rows)):
            row, d = x[r * width : (r + 1) * width], dy[r * step : r * step + width]
            if silu:
                for j in range(width):
                    v = _load(row[j])
                    du = _through_silu(v * gain[j] + offset[j], _load(d[j]), row)
                    first[j] += du
                    second[j] += du * (v - shift[j])
            else:
                for j in range(width):
                    du = _load(d[j])
                    first[j] += du
                    second[j] += du * (_load(row[j]) - shift[j])
        for j in range(width):
            sums[0, j % c] += first[j]
            sums[1, j % c] += second[j]


@njit(**_LOOP)
def _map_back(x, dy, dx, step, gain, offset, slope, level, silu):  # type: ignore[no-untyped-def]
    """dx = gain du - slope x - level, of a piece; rows of dy lie `step` numbers apart."""
    width = len(gain)
    for r in range(len(x) // max(width, 1)):
        row, d, out = x[r * width : (r + 1) * width], dy[r * step : r * step + width], dx[r * width : (r + 1) * width]
        if silu:
            for j in range(width):
                v = _load(row[j])
                du = _through_silu(v * gain[j] + offset[j], _load(d[j]), row)
                _store(out, j, du * gain[j] - v * slope[j] - level[j])
        else:
            for j in range(width):
                _store(out, j, _load(d[j]) * gain[j] - _load(row[j]) * slope[j] - level[j])


@njit(**_LOOP)
def _set_line(weight, bias, statistics, i, gain, offset):  # type: ignore[no-untyped-def]
    """u = gain x + offset, of sample i."""
    c, row = statistics.shape[2], min(i, len(weight) - 1)
    for j in range(len(gain)):
        g = weight[row, j % c] * statistics[1, i, j % c]
        gain[j] = g
        offset[j] = bias[row, j % c] - statistics[0, i, j % c] * g


@njit(**_LOOP)
def _set_gradients(dy, sums, i, groups, weight, statistics, gradients, slope, level):  # type: ignore[no-untyped-def]
    """Of weight and bias of sample i, and dx = gain du - slope x - level."""
    c, row = statistics.shape[2], min(i, len(weight) - 1)
    size, n = c // groups, dy.shape[1] * dy.shape[2] / c
    for group in range(groups):
        of_weight = of_bias = 0.0
        for j in range(group * size, (group + 1) * size):
            total = product = 0.0
            for p in range(dy.shape[1]):
                total += sums[0, i, p, j]
                product += sums[1, i, p, j]
            centre = statistics[0, i, j]
            about_centre = product + (np.float32(centre) - centre) * total  # product is about the rounded one
            gradients[0, i, j] = about_centre * statistics[1, i, j]
            gradients[1, i, j] = total
            of_weight += weight[row, j] * gradients[0, i, j] / (n * size)
            of_bias += weight[row, j] * gradients[1, i, j] / (n * size)
        for j in range(group * size, (group + 1) * size):
            rstd = statistics[1, i, j]
            of_x = rstd * rstd * of_weight
            at = rstd * of_bias - statistics[0, i, j] * of_x
            for k in range(j, len(slope), c):
                slope[k] = of_x
                level[k] = at


@lru_cache
def _compiled(numbers: Any, *, is_backward: bool) -> Any:
    """What each thread does with a job, for activations of one kind."""

    def work(job):  # type: ignore[no-untyped-def]
        counters, silu, groups, width = job[_ADDRESS], job[_SILU] != 0, job[_GROUPS], job[_WIDTH]
        samples, pieces, c, rows = job[_SAMPLES], job[_PIECES], job[_CHANNELS], job[_ROWS]
        sums = carray(_at(job[_SUMS]), (2, samples, pieces, c), np.float64)
        statistics = carray(_at(job[_STATISTICS]), (2, samples, c), np.float64)
        weight, bias = carray(_at(job[_WEIGHT]), (rows, c), np.float32), carray(_at(job[_BIAS]), (rows, c), np.float32)
        shape = (samples, pieces, job[_CELLS] * c)
        of_x = (samples, pieces, job[_CELLS] * job[_FIRST_CHANNELS])
        of_beside = (samples, pieces, shape[2] - of_x[2])
        x, beside = carray(_at(job[_X]), of_x, numbers), carray(_at(job[_BESIDE]), of_beside, numbers)
        if is_backward:  # known when this is compiled, and the other half is not
            dy = carray(_at(job[_DY]), shape, numbers)
            gradients = carray(_at(job[_GRADIENTS]), (2, samples, c), np.float64)
            dx, d_beside = carray(_at(job[_OUT]), of_x, numbers), carray(_at(job[_OUT_BESIDE]), of_beside, numbers)
            given = x, beside, dy, dx, d_beside, weight, bias, sums, statistics, gradients
            _normalise_back(*given, groups, silu, width, counters)
        else:
            eps = carray(_at(counters + 8 * _EPS), (1,), np.float64)[0]
            y = carray(_at(job[_OUT]), shape, numbers)
            _normalise(x, beside, y, weight, bias, sums, statistics, groups, eps, silu, width, counters)

    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)


def forward(
    x: Tensor,
    beside: Tensor | None,
    y: Tensor,
    num_groups: int,
    weight: Float[Tensor, "b_or_1 c"],
    bias: Float[Tensor, "b_or_1 c"],
    eps: float,
    *,
    silu: bool,
) -> Float[Tensor, "2 b c"]:
    """Fill y (b, c, x, y, z), c the channels of x and of what is beside it, all with channels last.

    Returns mean and 1 / sd of each sample's groups, at their channels.
    """
    statistics = x.new_empty(2, *y.shape[:2], dtype=torch.float64)
    _run(x, beside, (y, None), num_groups, weight, bias, statistics, eps=eps, silu=silu)
    return statistics


def backward(
    x: Tensor,
    beside: Tensor | None,
    dy: Tensor,
    out: tuple[Tensor, Tensor | None],
    num_groups: int,
    weight: Float[Tensor, "b_or_1 c"],
    bias: Float[Tensor, "b_or_1 c"],
    statistics: Float[Tensor, "2 b c"],
    *,
    silu: bool,
) -> Float[Tensor, "2 b c"]:
    """Fill out, the gradients of x and of what is beside it; returns those of weight and bias, a sample and channel."""
    gradients = torch.empty_like(statistics)
    _run(x, beside, out, num_groups, weight, bias, statistics, dy, gradients, silu=silu)
    return gradients


def _run(
    x: Tensor,
    beside: Tensor | None,
    out: tuple[Tensor, Tensor | None],
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    dy: Tensor | None = None,
    gradients: Tensor | None = None,
    *,
    eps: float = 0.0,
    silu: bool,
) -> None:
    (b, c), num_cells = statistics.shape[1:], x[0, 0].numel()
    pieces = _num_pieces(num_cells)
    cells = num_cells // pieces
    sums = np.empty((2, b, pieces, c))
    width = c * _times(c, cells) if beside is None else c
    sizes = num_groups, width, b, pieces, cells, c, x.shape[1], len(weight)
    arrays = statistics, weight, bias, x, beside, *out, dy, gradients
    addresses = [x.data_ptr() if array is None else array.data_ptr() for array in arrays]  # of x, where nothing is read
    job = np.array([0, 0, 0, 0, silu, *sizes, 0, sums.ctypes.data, *addresses], np.int64)
    job[_ADDRESS], job[_EPS : _EPS + 1].view(np.float64)[0] = job.ctypes.data, eps
    work = _compiled(np.uint16 if x.dtype == torch.bfloat16 else np.float32, is_backward=dy is not None)
    # One or all: a team of another size than the last one's would end threads, and start them again.
    is_large = b * pieces > 1 and b * c * num_cells >= NUMBERS_OF_TWO
    openmp.run(work, job, torch.get_num_threads() if is_large else 1)


@lru_cache
def _num_pieces(num_cells: int) -> int:
    """Into how many equal pieces the cells of a sample are cut."""
    return next(n for n in range(max(num_cells // CELLS_A_PIECE, 1), 0, -1) if num_cells % n == 0)


@lru_cache
def _times(c: int, num_cells: int) -> int:
    """How often a value of c channels is repeated: to about ROW numbers, of which the cells of a piece are a multiple."""
    times = 1
    while 2 * times * c <= ROW and num_cells % (2 * times) == 0:
        times *= 2
    return times
