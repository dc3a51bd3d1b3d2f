"""What a data set holds, in numbers and pictures: counts, fills, copies, near-duplicates and leaks between splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, Integer, UInt8
from torch import Tensor

from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import SPLITS
from shapediff.data.packing import fill_fraction
from shapediff.errors import ConfigError
from shapediff.geometry.render import Picture, contact_sheet, render_voxels
from shapediff.grid.morton import morton_to_dense

Cells = Integer[np.ndarray, "n cells"]

NUM_BINS = 16
_BLOCK = 256
_MAX_CELLS = 16**3
_CHUNK_BYTES = 32 << 20
_PAIR_BYTES = 256 << 10  # of rows compared at once: fits the second cache; 8 pairs at 64^3 are fastest

# (256,) uint8: the number of bits in each byte.
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


@dataclass(frozen=True)
class ClassSummary:
    """One class: its shapes in each split, the (min, median, max) of their fill, and how many lie in each bin of fill.

    The bins are of equal width, from the smallest to the largest fill. A class without shapes has no `fill_spread`.
    """

    name: str
    num_per_split: dict[str, int]
    fill_spread: tuple[float, float, float] | None
    histogram: Int64[np.ndarray, " bins"]


@dataclass(frozen=True)
class NearDuplicates:
    """Pairs of one class whose grids differ and whose insides have an IoU of at least `threshold`.

    A grid that several shapes of the class hold is named once, by the first of them; where the pair lies across splits,
    by the first with which it does. Pairs that lie across splits come first, then the larger IoU. `pairs` (m, 2) are
    places in the data set, smaller first; `iou` (m,) is in [threshold, 1]; `is_across` (m,) says whether the two are in
    different splits. `groups` are the shapes that pairs join, and the copies of their grids.
    """

    threshold: float
    pairs: Int64[np.ndarray, "m 2"]
    iou: Float64[np.ndarray, " m"]
    is_across: Bool[np.ndarray, " m"]
    groups: list[list[int]]


@dataclass(frozen=True)
class Inspection:
    """What is to be said of a data set; groups are lists of places in it, `near` is None where it was not asked for."""

    classes: list[ClassSummary]
    copies: list[list[int]]
    near: NearDuplicates | None


def inspect_dataset(dataset: ShapeDataset, *, near: float) -> Inspection:
    """Count, measure and compare the shapes; `near` in (0, 1] is the IoU of near-duplicates, 0 for no search.

    Raises ConfigError for another `near`.
    """
    if not 0 <= near <= 1:
        raise ConfigError(f"near={near:g} is no IoU; use a number from 0 (no search) to 1, such as 0.95")
    fills = _fills(dataset)
    return Inspection(
        classes=[_summarize(dataset, label, fills) for label in range(len(dataset.classes))],
        copies=copies(dataset),
        near=near_duplicates(dataset, near=near) if near > 0 else None,
    )


def copies(dataset: ShapeDataset) -> list[list[int]]:
    """The groups of two or more shapes, of any class, with the same packed grid; the largest first."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, shape in enumerate(dataset.shapes):
        groups[shape.grid_sha256].append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group))


def num_across_splits(dataset: ShapeDataset, groups: Sequence[Sequence[int]]) -> int:
    """How many of the groups have members in more than one split."""
    return sum(len({dataset.shapes[place].split for place in group}) > 1 for group in groups)


def near_duplicates(dataset: ShapeDataset, *, near: float) -> NearDuplicates:
    """Every pair of distinct grids of one class with an IoU of at least `near`, in (0, 1]."""
    firsts = _first_holders(dataset)
    distinct = np.unique(firsts)
    found = [
        near_pairs(dataset, distinct[dataset.labels[distinct] == label], near=near)
        for label in range(len(dataset.classes))
    ]
    pairs, iou = np.concatenate([pairs for pairs, _ in found]), np.concatenate([iou for _, iou in found])
    named = _named_across(dataset, pairs, firsts)
    splits = np.array([shape.split for shape in dataset.shapes])[named]
    is_across = splits[:, 0] != splits[:, 1]
    order = np.lexsort((named[:, 1], named[:, 0], -iou, ~is_across))
    return NearDuplicates(near, named[order], iou[order], is_across[order], _near_groups(pairs, firsts))


def near_pairs(
    dataset: ShapeDataset, places: Int64[np.ndarray, " n"], *, near: float
) -> tuple[Int64[np.ndarray, "m 2"], Float64[np.ndarray, " m"]]:
    """The pairs of `places`, smaller place first, whose insides have an IoU |A & B| / |A | B| >= `near`; and the IoU.

    IoU >= t is |A & B| >= t/(1+t) (|A| + |B|). Bounds on |A & B| leave out most pairs, and none that is sought: it is
    at most the smaller volume; and, with a_k and b_k the voxels of A and B in cell k of 16^3,

        |A & B|  <=  sum_k min(a_k, b_k)  <=  sum_k sqrt(a_k) sqrt(b_k),

    the last a matrix product. What remains is compared bit by bit. Two empty insides are equal: their IoU is 1.
    """
    volumes, counts = _volumes_and_counts(dataset, places)
    order = np.argsort(volumes, kind="stable")
    places, volumes, counts = places[order], volumes[order], counts[order]
    found_pairs, found_iou = [np.empty((0, 2), dtype=np.int64)], [np.empty(0)]
    for rows, columns in _volume_blocks(volumes, near):
        first, second = _candidates(volumes, counts, rows, columns, near)
        shared = _intersections(dataset, places[first], places[second])
        union = volumes[first] + volumes[second] - shared
        iou = np.where(union > 0, shared / np.maximum(union, 1), 1.0)
        is_near = iou >= near
        found_pairs.append(np.sort(np.stack([places[first], places[second]], 1)[is_near], axis=1))
        found_iou.append(iou[is_near])
    return np.concatenate(found_pairs), np.concatenate(found_iou)


def picture_of(dataset: ShapeDataset, place: int, *, size: int) -> Picture:
    """A picture (size, size, 3) of one shape. Needs SciPy."""
    signal = dataset.batch([place])["voxels"].numpy()
    return render_voxels(morton_to_dense(signal)[0], size=size)


def class_sheet(dataset: ShapeDataset, label: int, *, num: int) -> Picture | None:
    """Up to `num` shapes of a class, spread over it, six in a row; None if it has none. Needs SciPy and Pillow."""
    members = np.flatnonzero(dataset.labels == label)
    if not members.size:
        return None
    chosen = members[np.unique(np.linspace(0, len(members) - 1, num).round().astype(int))]
    return contact_sheet([picture_of(dataset, int(place), size=192) for place in chosen], columns=6)


def _fills(dataset: ShapeDataset) -> Float64[np.ndarray, " n"]:
    chunks = _row_chunks(dataset, np.arange(len(dataset)))
    return np.concatenate([fill_fraction(dataset.packed(chunk), field=dataset.field) for chunk in chunks])


def _summarize(dataset: ShapeDataset, label: int, fills: Float64[np.ndarray, " n"]) -> ClassSummary:
    members = np.flatnonzero(dataset.labels == label)
    splits: list[str] = [dataset.shapes[place].split for place in members]
    mine = fills[members]
    spread = (float(mine.min()), float(np.median(mine)), float(mine.max())) if mine.size else None
    return ClassSummary(
        name=dataset.classes[label],
        num_per_split={split: splits.count(split) for split in SPLITS},
        fill_spread=spread,
        histogram=np.histogram(mine, bins=NUM_BINS)[0].astype(np.int64),
    )


def _first_holders(dataset: ShapeDataset) -> Int64[np.ndarray, " n"]:
    """For each shape the first one of its class that has the same packed grid, itself if none is before it."""
    firsts: dict[tuple[str, str], int] = {}
    keys = [(shape.class_name, shape.grid_sha256) for shape in dataset.shapes]
    return np.array([firsts.setdefault(key, place) for place, key in enumerate(keys)], dtype=np.int64)


def _named_across(
    dataset: ShapeDataset, pairs: Int64[np.ndarray, "m 2"], firsts: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, "m 2"]:
    """The pairs, named by other holders of the same grids where these lie in different splits."""
    holders: dict[int, dict[str, int]] = defaultdict(dict)
    for place, first in enumerate(firsts.tolist()):
        holders[first].setdefault(dataset.shapes[place].split, place)
    named = [_named_pair(holders[one], holders[other]) for one, other in pairs.tolist()]
    return np.array(named, dtype=np.int64).reshape(-1, 2)


def _named_pair(one: dict[str, int], other: dict[str, int]) -> list[int]:
    """A holder of each of two grids, from {split: first holder}: in different splits if there are such."""
    across = [(place, mate) for split, place in one.items() for mates, mate in other.items() if split != mates]
    return sorted(across[0] if across else [*one.values(), *other.values()])


def _near_groups(pairs: Int64[np.ndarray, "m 2"], firsts: Int64[np.ndarray, " n"]) -> list[list[int]]:
    """What the pairs connect, and whose grid is a copy of one of these; the largest first."""
    roots = _connected(pairs, len(firsts))[firsts]
    groups: dict[int, list[int]] = {int(root): [] for root in roots[np.unique(pairs)]}
    for place in np.flatnonzero(np.isin(roots, list(groups))):
        groups[int(roots[place])].append(int(place))
    return sorted(groups.values(), key=lambda group: (-len(group), group))


def _connected(pairs: Int64[np.ndarray, "m 2"], num: int) -> Int64[np.ndarray, " n"]:
    """The smallest of the nodes 0 .. num - 1 that each node is connected to, by hooking and shortcutting."""
    roots = np.arange(num)
    while True:
        hooked = roots.copy()
        low = roots[pairs].min(1)
        for end in (0, 1):
            np.minimum.at(hooked, roots[pairs[:, end]], low)
        hooked = hooked[hooked]
        if (hooked == roots).all():
            return roots
        roots = hooked


def _volume_blocks(volumes: Int64[np.ndarray, " n"], near: float) -> Iterator[tuple[slice, slice]]:
    """Blocks (rows, columns) of the pairs, columns not before rows, whose ascending volumes allow an IoU of `near`."""
    for start in range(0, len(volumes), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(volumes)))
        # One voxel more than the bound: against the rounding of the division.
        end = int(np.searchsorted(volumes, volumes[rows.stop - 1] / near + 1, side="right"))
        for column in range(start, end, _BLOCK):
            yield rows, slice(column, min(column + _BLOCK, end))


def _candidates(
    volumes: Int64[np.ndarray, " n"], counts: Cells, rows: slice, columns: slice, near: float
) -> tuple[Int64[np.ndarray, " m"], Int64[np.ndarray, " m"]]:
    """The pairs (first < second) in a block of the pairs that the bounds of `near_pairs` leave."""
    # A float32 sum of k positive products errs by less than k * 2^-24 of it; 16 more for the roots and the comparison.
    slack = 1 + (counts.shape[1] + 16) * 2.0**-24
    small, large = torch.from_numpy(volumes[rows, None]).float(), torch.from_numpy(volumes[None, columns]).float()
    bound = torch.minimum(_roots(counts[rows]) @ _roots(counts[columns]).T, small) * slack
    is_candidate = bound >= near / (1 + near) * (small + large)
    if rows.start == columns.start:
        is_candidate = is_candidate.triu(1)
    first, second = np.nonzero(is_candidate.numpy())
    first, second = first + rows.start, second + columns.start
    sharper = _sums_over_pairs(np.minimum, counts, first, second) * slack
    remains = sharper >= near / (1 + near) * (volumes[first] + volumes[second])
    return first[remains], second[remains]


def _roots(counts: Cells) -> Float32[Tensor, "n cells"]:
    return torch.from_numpy(counts.astype(np.float32)).sqrt_()


def _volumes_and_counts(
    dataset: ShapeDataset, places: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Cells]:
    """The voxels inside each shape, and those inside each of its min(R, 16)^3 cells, in the smallest dtype."""
    num_voxels = 8 * _inside_bits(dataset, np.zeros(1, dtype=np.int64)).shape[1]
    num_cells = min(_MAX_CELLS, num_voxels)
    cells = np.empty((len(places), num_cells), dtype=np.min_scalar_type(num_voxels // num_cells))
    for chunk in _row_chunks(dataset, np.arange(len(places))):
        cells[chunk] = _cell_counts(_inside_bits(dataset, places[chunk]))
    return cells.sum(1, dtype=np.int64), cells


def _cell_counts(bits: UInt8[np.ndarray, "n bytes"]) -> Cells:
    if bits.shape[1] < _MAX_CELLS:  # below 32^3 a cell is a voxel
        return np.unpackbits(bits, axis=1, bitorder="little")
    return _bit_counts(bits).reshape(len(bits), _MAX_CELLS, -1).sum(-1, dtype=np.uint32)


def _inside_bits(dataset: ShapeDataset, places: Int64[np.ndarray, " b"]) -> UInt8[np.ndarray, "b bytes"]:
    """One bit a voxel of the stored grids, set inside, in Morton order."""
    rows = dataset.packed(places)
    return rows if dataset.field == "occupancy" else np.packbits(rows < 0, axis=1, bitorder="little")


def _intersections(
    dataset: ShapeDataset, first: Int64[np.ndarray, " m"], second: Int64[np.ndarray, " m"]
) -> Int64[np.ndarray, " m"]:
    """The voxels that lie inside both shapes of each pair of places."""
    if not len(first):
        return np.empty(0, dtype=np.int64)
    used, rows = np.unique(np.concatenate([first, second]), return_inverse=True)
    bits = np.concatenate([_inside_bits(dataset, chunk) for chunk in _row_chunks(dataset, used)])
    words = bits.view(np.uint64) if bits.shape[1] % 8 == 0 else bits  # one byte at 2^3
    return _sums_over_pairs(_num_shared_bits, words, rows[: len(first)], rows[len(first) :])


def _num_shared_bits(one: Integer[np.ndarray, "m k"], other: Integer[np.ndarray, "m k"]) -> UInt8[np.ndarray, "m k"]:
    return _bit_counts(one & other)


def _sums_over_pairs(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    values: Integer[np.ndarray, "n k"],
    first: Int64[np.ndarray, " m"],
    second: Int64[np.ndarray, " m"],
) -> Int64[np.ndarray, " m"]:
    """The sum below 2^32 of `measure(values[i], values[j])` of each pair (i, j), a few pairs at a time."""
    sums = np.empty(len(first), dtype=np.int64)
    for chunk in _chunks(np.arange(len(first)), _PAIR_BYTES // (values.shape[1] * values.itemsize)):
        sums[chunk] = measure(values[first[chunk]], values[second[chunk]]).sum(1, dtype=np.uint32)
    return sums


def _table_bit_counts(numbers: Integer[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    octets = numbers[..., None].view(np.uint8)
    return _BITS_OF_BYTE[octets].sum(-1, dtype=np.uint8)


_bit_counts = getattr(np, "bitwise_count", _table_bit_counts)  # NumPy 1.26 has none


def _row_chunks(dataset: ShapeDataset, places: Int64[np.ndarray, " n"]) -> Iterator[Int64[np.ndarray, " c"]]:
    """The places in parts whose rows take about 32 MiB; none for no places."""
    return _chunks(places, _CHUNK_BYTES // dataset.packed(np.zeros(1, dtype=np.int64)).nbytes)


def _chunks(values: Int64[np.ndarray, " n"], size: int) -> Iterator[Int64[np.ndarray, " c"]]:
    size = max(1, size)
    for start in range(0, len(values), size):
        yield values[start : start + size]
