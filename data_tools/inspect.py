"""What a data set holds, with a picture of each class: python data_tools/inspect.py DATASET"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from data_tools import _cli
from shapediff.data.dataset import ShapeDataset
from shapediff.data.packing import fill_fraction
from shapediff.data.report import printable
from shapediff.grid.morton import morton_to_dense

_CHUNK = 256


def main() -> int:
    args = _parser().parse_args()
    dataset = ShapeDataset(args.dataset)
    fills = _fills(dataset)
    _print_header(dataset)
    _print_classes(dataset, fills)
    _print_duplicates(dataset)
    if args.num > 0:
        folder = args.sheets or args.dataset / "sheets"
        for label, name in enumerate(dataset.classes):
            _write_sheet(
                dataset,
                label,
                folder / f"{label:03d}_{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.png",
                num=args.num,
            )
        _cli.console.print(f"pictures in {escape(printable(str(folder)))}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for the pictures; None: DATASET/sheets")
    parser.add_argument(
        "--num", type=int, default=24, help="shapes in the picture of a class, spread over it; 0: no pictures"
    )
    return parser


def _fills(dataset: ShapeDataset) -> np.ndarray:
    chunks = [np.arange(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    return np.concatenate([fill_fraction(dataset.packed(chunk), field=dataset.field) for chunk in chunks])


def _print_header(dataset: ShapeDataset) -> None:
    band = f", truncated at {dataset.truncation_voxels:g} voxels" if dataset.field == "tsdf" else ""
    path = escape(printable(str(dataset.path)))
    _cli.console.print(f"{path}: {len(dataset)} shapes, {dataset.resolution}^3 {dataset.field}{band}", soft_wrap=True)


def _print_classes(dataset: ShapeDataset, fills: np.ndarray) -> None:
    table = Table()
    for column in ("label", "class", "train", "val", "test", "fill min", "median", "max"):
        table.add_column(column, justify="left" if column == "class" else "right")
    splits = np.array([shape.split for shape in dataset.shapes])
    for label, name in enumerate(dataset.classes):
        mine = dataset.labels == label
        counts = [str(int((mine & (splits == split)).sum())) for split in ("train", "val", "test")]
        spread = [f"{value:.4f}" for value in np.quantile(fills[mine], (0, 0.5, 1))] if mine.any() else ["-"] * 3
        table.add_row(str(label), escape(printable(name)), *counts, *spread)
    _cli.console.print(table)


def _print_duplicates(dataset: ShapeDataset) -> None:
    groups = defaultdict(list)
    for shape in dataset.shapes:
        groups[shape.grid_sha256].append(shape)
    repeated = [group for group in groups.values() if len(group) > 1]
    if not repeated:
        _cli.console.print("no two shapes have the same grid")
        return
    across = sum(len({shape.split for shape in group}) > 1 for group in repeated)
    num_extra = sum(len(group) - 1 for group in repeated)
    _cli.console.print(
        f"{num_extra} shapes repeat another's grid; {across} of {len(repeated)} groups lie across splits"
    )
    for group in repeated[:10]:
        names = ", ".join(escape(printable(shape.id)) for shape in group[:6])
        _cli.console.print(f"    {len(group)} times: {names}", soft_wrap=True, highlight=False)


def _write_sheet(dataset: ShapeDataset, label: int, path: Path, *, num: int) -> None:
    from shapediff.geometry.render import contact_sheet, render_voxels, save_png

    members = np.flatnonzero(dataset.labels == label)
    if not members.size:
        return
    chosen = members[np.unique(np.linspace(0, len(members) - 1, num).round().astype(int))]
    signals = morton_to_dense(dataset.batch(chosen)["voxels"].numpy())
    images = [render_voxels(signal, size=192) for signal in signals]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(contact_sheet(images, columns=6), path)


if __name__ == "__main__":
    _cli.run(main)
