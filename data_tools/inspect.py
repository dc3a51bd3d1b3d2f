"""What a data set holds, with a picture of each class and a page to look at: python data_tools/inspect.py DATASET"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import re
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from data_tools import _cli
from data_tools._inspect_page import page
from shapediff.data.dataset import ShapeDataset
from shapediff.data.inspection import Inspection, NearDuplicates, class_sheet, inspect_dataset, num_across_splits
from shapediff.data.manifest import SPLITS
from shapediff.data.report import printable
from shapediff.errors import DataError
from shapediff.files import write_text
from shapediff.geometry.render import Picture, save_png

_NUM_LISTED = 10


def main() -> int:
    args = _parser().parse_args()
    dataset = ShapeDataset(args.dataset)
    with _cli.console.status("reading and comparing"):
        inspection = inspect_dataset(dataset, near=args.near)
    _print_header(dataset)
    _print_classes(inspection)
    _print_copies(dataset, inspection.copies)
    if inspection.near is not None:
        _print_near(dataset, inspection.near)
    with _cli.console.status("drawing"):
        sheets = _draw_sheets(dataset, num=args.num)
        text = page(dataset, inspection, sheets=sheets)
    _write(dataset, sheets, text, folder=args.sheets or args.dataset / "sheets", html=args.html)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--sheets", type=Path, help="folder for the pictures; None: DATASET/sheets")
    parser.add_argument("--html", type=Path, help="the page; None: DATASET/inspect.html")
    parser.add_argument(
        "--num", type=int, default=24, help="shapes in the picture of a class, spread over it; 0: no pictures"
    )
    parser.add_argument(
        "--near",
        type=float,
        default=0.95,
        help="IoU from which two shapes of a class are near-duplicates; 0: no search",
    )
    return parser


def _print_header(dataset: ShapeDataset) -> None:
    band = f", truncated at {dataset.truncation_voxels:g} voxels" if dataset.field == "tsdf" else ""
    path = escape(printable(str(dataset.path)))
    _cli.console.print(f"{path}: {len(dataset)} shapes, {dataset.resolution}^3 {dataset.field}{band}", soft_wrap=True)


def _print_classes(inspection: Inspection) -> None:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))  # 80 columns hold it
    for column in ("label", "class", *SPLITS, "fill min", "median", "max"):
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    table.add_column("fill, min to max", no_wrap=True)
    for label, summary in enumerate(inspection.classes):
        counts = [str(summary.num_per_split[split]) for split in SPLITS]
        spread = [f"{value:.3f}" for value in summary.fill_spread] if summary.fill_spread else ["-"] * 3
        bars = _bars(summary.histogram.tolist())
        table.add_row(str(label), escape(printable(summary.name)), *counts, *spread, bars)
    _cli.console.print(table)


def _bars(counts: list[int]) -> str:
    """One character a count: a space for 0, then heights in proportion to the largest, rounded up."""
    heights = " ▁▂▃▄▅▆▇█" if _cli.console.encoding.startswith("utf") else " .:-=+*#@"
    most = max(*counts, 1)
    return "".join(heights[-(-count * (len(heights) - 1) // most)] for count in counts)


def _print_copies(dataset: ShapeDataset, groups: list[list[int]]) -> None:
    if not groups:
        _cli.console.print("no two shapes have the same grid")
        return
    num_extra = sum(len(group) - 1 for group in groups)
    across = num_across_splits(dataset, groups)
    _cli.console.print(f"{num_extra} shapes repeat another's grid; {across} of {len(groups)} groups lie across splits")
    for group in groups[:_NUM_LISTED]:
        _print_line(f"{len(group)} times: " + ", ".join(_name(dataset, place) for place in group[:6]))


def _print_near(dataset: ShapeDataset, near: NearDuplicates) -> None:
    if not len(near.pairs):
        _cli.console.print(f"no near-duplicates (IoU of at least {near.threshold:g})")
        return
    _cli.console.print(
        f"{len(near.pairs)} pairs of near-duplicates (IoU of at least {near.threshold:g}) in {len(near.groups)} groups; "
        f"{int(near.is_across.sum())} pairs and {num_across_splits(dataset, near.groups)} groups lie across splits",
        soft_wrap=True,
    )
    for (first, second), iou in list(zip(near.pairs.tolist(), near.iou.tolist(), strict=True))[:_NUM_LISTED]:
        _print_line(f"{iou:.4f}: {_name(dataset, first)}, {_name(dataset, second)}")


def _print_line(line: str) -> None:
    _cli.console.print(f"    {line}", soft_wrap=True, highlight=False)


def _name(dataset: ShapeDataset, place: int) -> str:
    shape = dataset.shapes[place]
    return f"{escape(printable(shape.id))} ({shape.split})"


def _draw_sheets(dataset: ShapeDataset, *, num: int) -> dict[int, Picture]:
    """{label: picture} of the classes that have shapes; nothing if `num` is 0."""
    labels = range(len(dataset.classes)) if num > 0 else ()
    drawn = {label: class_sheet(dataset, label, num=num) for label in labels}
    return {label: sheet for label, sheet in drawn.items() if sheet is not None}


def _write(dataset: ShapeDataset, sheets: dict[int, Picture], text: str, *, folder: Path, html: Path | None) -> None:
    html = html or dataset.path / "inspect.html"
    try:
        for label, sheet in sheets.items():
            name = re.sub(r"[^A-Za-z0-9._-]", "_", dataset.classes[label])[:100]
            save_png(sheet, folder / f"{label:03d}_{name}.png")
        write_text(html, text)
    except OSError as error:
        raise DataError(f"{error}; name other places with --html and --sheets") from error
    if sheets:
        _cli.console.print(f"pictures in {escape(printable(str(folder)))}", soft_wrap=True)
    _cli.console.print(f"page {escape(printable(str(html)))}", soft_wrap=True)


if __name__ == "__main__":
    _cli.run(main)
