"""Procedural meshes of twelve classes -> OUT/<class>/*.obj with a caption beside each: python data_tools/make_shapes.py OUT"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_tools import _cli
from shapediff.data.shapes import CLASSES, FORMATS, write_meshes

SHEET_COLUMNS = 8


def main() -> int:
    args = _parser().parse_args()
    bar = Progress(TextColumn("shapes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=_cli.console)
    with bar:
        task = bar.add_task("shapes", total=None)
        num_written = write_meshes(
            args.out,
            classes=args.classes,
            per_class=args.per_class,
            seed=args.seed,
            workers=args.workers,
            format=args.format,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    total = args.per_class * len(args.classes)
    _cli.console.print(
        f"{num_written} meshes written, {total - num_written} were there: {args.out}, {len(args.classes)} classes"
    )
    if args.sheet:
        _draw(args.out, args.classes, args.per_class, args.format, args.sheet)
        _cli.console.print(f"picture: {args.sheet}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to; run again to go on or to add more")
    parser.add_argument("--per-class", type=int, default=200, help="meshes of each class")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same meshes")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), metavar="CLASS", help=", ".join(CLASSES))
    parser.add_argument("--format", choices=FORMATS, default="obj")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--sheet", type=Path, help="also draw the first eight of each class to this PNG")
    return parser


def _draw(out: Path, classes: list[str], per_class: int, format: str, sheet: Path) -> None:
    from shapediff.geometry.mesh import load_mesh
    from shapediff.geometry.render import contact_sheet, render_mesh, save_png

    columns = min(SHEET_COLUMNS, per_class)
    names = [(name, n) for name in classes for n in range(columns)]
    pictures = [render_mesh(load_mesh(out / name / f"{name}_{n:05d}.{format}"), size=144) for name, n in names]
    save_png(contact_sheet(pictures, columns=columns, captions=[name for name, _ in names]), sheet)


if __name__ == "__main__":
    _cli.run(main)
