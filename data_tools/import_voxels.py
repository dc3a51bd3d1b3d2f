"""Voxel grids (.binvox, .npz, .npy) -> a data set: python data_tools/import_voxels.py GRIDS OUT"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from pathlib import Path

from data_tools import _cli
from shapediff.data.importing import import_voxels
from shapediff.errors import ConfigError


def main() -> int:
    args = _parser().parse_args()
    with _cli.progress_bar("grids") as progress:
        summary = import_voxels(
            args.grids,
            args.out,
            up=args.up,
            turns=dict(map(_turn, args.turn)),
            resolution=args.resolution,
            key=args.key,
            threshold=args.threshold,
            progress=progress,
        )
    _cli.print_summary(summary)
    return _cli.exit_status(summary, strict=args.strict)


def _turn(text: str) -> tuple[str, int]:
    class_name, _, turns = text.rpartition("=")
    if not class_name or turns not in ("1", "2", "3"):
        raise ConfigError(f"--turn {text!r}; write CLASS=K with K 1, 2 or 3, such as chair=1")
    return class_name, int(turns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("grids", type=Path, help="a file, or a folder of <class>/*.binvox|npz|npy or of <class>.npz")
    parser.add_argument("out", type=Path, help="folder of the data set")
    parser.add_argument("--up", choices=["y", "z"], default="y", help="the grids' vertical axis")
    parser.add_argument(
        "--turn",
        action="append",
        default=[],
        metavar="CLASS=K",
        help="turn a class by K quarter turns about the vertical (one takes +z to +x) so that it faces +z",
    )
    parser.add_argument("--resolution", type=int, help="take only grids that come to this many voxels a side")
    parser.add_argument("--key", help="name of the array in .npz files")
    parser.add_argument("--threshold", type=float, default=0.5, help="floats above it are inside")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if anything was skipped")
    return parser


if __name__ == "__main__":
    _cli.run(main)
