"""Samples a second out of a data set in random order, beside the limit of memory and beside other containers of the same grids.

    python benchmarks/dataset.py [--resolution 64] [--num 4000] [--out FILE.md]

Every reader gives batches of 64 float32 signals (64, R^3) in [-1, 1], each made in the memory of one thread. The grids are
procedural shapes, solid; files are in the page cache. A tar cannot be read in random order: it is streamed, the best it can do.
"""

from __future__ import annotations

import argparse
import io
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from shapediff.data.dataset import ShapeDataset
from shapediff.data.packing import pack_grid
from shapediff.data.sampler import sample_seeds
from shapediff.data.shapes import CLASSES, make_shape
from shapediff.data.shards import ShardWriter
from shapediff.geometry.voxelize import voxelize

BATCH, SECONDS = 64, 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num", type=int, default=4000, help="shapes in the data set")
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = _table(Path(folder), resolution=args.resolution, num=args.num)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _table(folder: Path, *, resolution: int, num: int) -> list[str]:
    grids = _grids(resolution, num)
    dataset = _dataset(folder / "shards", grids, resolution)
    seeds = sample_seeds(0, np.arange(BATCH))
    coarse = ShapeDataset(dataset.path, resolution=resolution // 2)
    readers: dict[str, Callable[[np.ndarray], object]] = {
        "shapediff": dataset.batch,
        "shapediff, mirrored and turned": lambda batch: dataset.batch(batch, mirror_seeds=seeds, turn_seeds=seeds),
        f"shapediff at {resolution // 2}^3 of the same shards": coarse.batch,
        **_limits(resolution),
    }
    for name, make in {"HDF5, packed": _hdf5, "one .npz a shape": _npz, "tar stream of .npz": _tar}.items():
        readers[name] = make(folder / name.split()[0], grids, resolution)
    rows, ours = [], 0.0
    for name, read in readers.items():
        rate = _samples_a_second(read, num)
        ours = ours or rate
        rows.append(f"| {name} | {rate:,.0f} | {rate / ours:.2f} |")
    return [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{num} shapes of {resolution}^3, batches of {BATCH}, one thread, Python {platform.python_version()}, "
        f"numpy {np.__version__}.",
        "",
        "| | samples a second | of shapediff |",
        "|---|---|---|",
        *rows,
    ]


def _grids(resolution: int, num: int) -> np.ndarray:
    """(num, R^3 / 8) packed occupancy in Morton order: 24 shapes over and over, shifted so that no two are the same."""
    shapes = [
        voxelize(make_shape(name, seed=seed).mesh, resolution=resolution) for name in CLASSES for seed in range(2)
    ]
    return np.stack(
        [pack_grid(np.roll(shapes[i % len(shapes)], i // len(shapes), axis=2), field="occupancy") for i in range(num)]
    )


def _samples_a_second(read: Callable[[np.ndarray], object], num: int) -> float:
    order = np.random.default_rng(0).permutation(num)
    batches = [order[i : i + BATCH] for i in range(0, num - BATCH + 1, BATCH)]
    for batch in batches[:2]:
        read(batch)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS:
        read(batches[count % len(batches)])
        count += 1
    return count * BATCH / passed


def _dataset(folder: Path, grids: np.ndarray, resolution: int) -> ShapeDataset:
    writer = ShardWriter(folder, resolution=resolution, field="occupancy", truncation_voxels=0, classes=["shape"])
    for i, row in enumerate(grids):
        writer.add(row, id=str(i), source=str(i), class_name="shape")
    writer.finish()
    return ShapeDataset(folder)


def _limits(resolution: int) -> dict[str, Callable[[np.ndarray], object]]:
    """What writing float32 alone costs, into fresh memory as a batch does."""
    source = np.ones((BATCH, resolution**3), np.float32)
    return {"limit: a copy of float32 in memory": lambda _: source.copy()}


def _unpack(packed: np.ndarray) -> np.ndarray:
    return 2 * np.unpackbits(packed, axis=-1, bitorder="little").astype(np.float32) - 1


def _hdf5(folder: Path, grids: np.ndarray, resolution: int) -> Callable[[np.ndarray], object]:
    import h5py

    with h5py.File(folder.with_suffix(".h5"), "w") as file:
        file.create_dataset("grids", data=grids, chunks=(1, grids.shape[1]), compression="gzip", compression_opts=1)
    data = h5py.File(folder.with_suffix(".h5"))["grids"]

    def read(batch: np.ndarray) -> object:
        order = np.argsort(batch)  # h5py wants rising indices
        return _unpack(data[batch[order]])[np.argsort(order)]

    return read


def _npz(folder: Path, grids: np.ndarray, resolution: int) -> Callable[[np.ndarray], object]:
    folder.mkdir()
    for i, row in enumerate(grids):
        np.savez_compressed(folder / f"{i}.npz", grid=row)

    def read(batch: np.ndarray) -> object:
        return np.stack([_unpack(np.load(folder / f"{i}.npz")["grid"]) for i in batch])

    return read


def _tar(folder: Path, grids: np.ndarray, resolution: int) -> Callable[[np.ndarray], object]:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        for i, row in enumerate(grids):
            content = io.BytesIO()
            np.savez_compressed(content, grid=row)
            info = tarfile.TarInfo(f"{i}.npz")
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)

    def stream() -> Iterator[np.ndarray]:
        while True:
            with tarfile.open(path, "r|") as archive:
                for member in archive:
                    yield np.load(io.BytesIO(archive.extractfile(member).read()))["grid"]  # type: ignore[union-attr]

    rows = stream()
    return lambda batch: np.stack([_unpack(next(rows)) for _ in batch])


if __name__ == "__main__":
    main()
