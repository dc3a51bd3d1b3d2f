"""Reductions over sorted segments: rows of one segment lie next to each other, as the children of an octree node do.

Segments are given by pointers as in CSR: segment s is rows `indptr[s]` to `indptr[s + 1]`. torch-scatter's `segment_csr` does
the work where it is installed, torch alone where it is not; both give the same maxima exactly, and sums and means up to the
order of addition.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

try:
    from torch_scatter import segment_csr
except ImportError:
    segment_csr = None

SegmentOp = Literal["sum", "mean", "max"]
HAS_TORCH_SCATTER = segment_csr is not None


def segment_reduce(
    values: Float[Tensor, "n ..."], indptr: Int[Tensor, " segments_plus_1"], op: SegmentOp = "sum"
) -> Float[Tensor, "segments ..."]:
    """Reduce each segment of `values` (n, ...) to one row: (segments, ...). An empty segment gives 0 for every op.

    Differentiable in `values`; a maximum that several rows share has its gradient in one or all of them.
    Raises ValueError unless `indptr` rises from 0 to n.
    """
    if op not in get_args(SegmentOp):
        raise ValueError(f"op={op!r}; use one of {', '.join(get_args(SegmentOp))}")
    _check_pointers(indptr, len(values))
    if segment_csr is None:
        return _reduce_with_torch(values, indptr, op)
    return _reduce_with_scatter(values, indptr, op)


def indptr_from_sorted(ids: Int[Tensor, " n"], num_segments: int) -> Int[Tensor, " segments_plus_1"]:
    """The pointers of rows labelled by rising segment ids in [0, num_segments): (num_segments + 1,) int64.

    The children of every octree parent, from sorted Morton codes: `indptr_from_sorted(codes >> 3, num_parents)`.
    Raises ValueError where ids fall or lie outside the range.
    """
    if len(ids) and (bool((ids.diff() < 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= num_segments):
        raise ValueError(f"ids must rise within [0, {num_segments}); sort them first")
    return torch.searchsorted(ids.contiguous(), torch.arange(num_segments + 1, device=ids.device, dtype=ids.dtype))


def _reduce_with_scatter(values: Tensor, indptr: Tensor, op: SegmentOp) -> Tensor:
    return segment_csr(values.contiguous(), indptr, reduce=op)


def _reduce_with_torch(values: Tensor, indptr: Tensor, op: SegmentOp) -> Tensor:
    lengths = indptr.diff()
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths)
    out = values.new_zeros(len(lengths), *values.shape[1:])
    if op == "max":
        index = segment.reshape(-1, *[1] * (values.ndim - 1)).expand_as(values)
        return out.scatter_reduce(0, index, values, "amax", include_self=False)
    total = out.index_add(0, segment, values)
    if op == "sum":
        return total
    return total / lengths.clamp(min=1).to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))


def _check_pointers(indptr: Tensor, num_rows: int) -> None:
    if indptr.ndim != 1 or len(indptr) < 1 or indptr.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indptr must be (segments + 1,) integers, got {tuple(indptr.shape)} {indptr.dtype}")
    if int(indptr[0]) != 0 or int(indptr[-1]) != num_rows or bool((indptr.diff() < 0).any()):
        raise ValueError(f"indptr must rise from 0 to the number of rows, {num_rows}; found {indptr.tolist()[:8]} ...")
