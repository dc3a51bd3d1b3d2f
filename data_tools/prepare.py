"""MESHES/<class>/*.obj|off|ply|stl|glb|gltf|3mf|dae -> a data set: python data_tools/prepare.py MESHES OUT"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # The repository in place of this folder, whose inspect.py must not come before the standard library's.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
from pathlib import Path

from data_tools import _cli
from shapediff.data.mesh_job import MeshLimits
from shapediff.data.preparation import DEFAULT_LIMITS as LIMITS
from shapediff.data.preparation import prepare
from shapediff.errors import ConfigError


def main() -> int:
    args = _parser().parse_args()
    with _cli.progress_bar("meshes") as progress:
        summary = prepare(
            args.meshes,
            args.out,
            resolution=args.resolution,
            field=args.field,
            truncation=args.truncation,
            up=args.up,
            workers=args.workers,
            classes=args.classes,
            limit=args.limit,
            splits=_read_splits(args.splits) if args.splits else None,
            timeout=args.timeout,
            limits=MeshLimits(
                max_faces=args.max_faces,
                max_bytes=int(args.max_megabytes * 2**20),
                max_memory=int(args.max_memory * 2**30),
            ),
            cluster=args.cluster,
            progress=progress,
        )
    _cli.print_summary(summary)
    return _cli.exit_status(summary, strict=args.strict)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "meshes",
        type=Path,
        help="folder with a folder of meshes for each class (ModelNet and ShapeNet too), "
        ".zip or .tar archive of one, or .csv table: path, class[, split, caption]",
    )
    parser.add_argument("out", type=Path, help="folder of the data set; run again to continue or to add new meshes")
    parser.add_argument("--resolution", type=int, default=64, help="voxels a side, a power of two")
    parser.add_argument("--field", choices=["occupancy", "tsdf"], default="occupancy")
    parser.add_argument("--truncation", type=float, default=3.0, help="band of the TSDF, in voxels")
    parser.add_argument("--up", choices=["y", "z"], default="y", help="the meshes' vertical axis")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes, one thread each; 0: in this process"
    )
    parser.add_argument("--classes", nargs="+", help="only these, in the order of their labels")
    parser.add_argument("--limit", type=int, help="at most this many meshes of each class")
    parser.add_argument("--splits", type=Path, help='JSON {"chair/a.obj": "train" | "val" | "test"}; others by a hash')
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one mesh may take")
    parser.add_argument("--max-faces", type=int, default=LIMITS.max_faces, help="skip a mesh with more")
    parser.add_argument("--max-megabytes", type=float, default=LIMITS.max_bytes / 2**20, help="skip a larger file")
    parser.add_argument(
        "--max-memory", type=float, default=LIMITS.max_memory / 2**30, help="GiB that a worker may take"
    )
    parser.add_argument(
        "--cluster", metavar="ADDRESS", help="a Dask scheduler, such as tcp://host:8786, in place of --workers"
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 if any mesh was skipped")
    return parser


def _read_splits(path: Path) -> dict:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--splits {path} cannot be read: {error}") from error
    if not isinstance(splits, dict) or not all(isinstance(split, str) for split in splits.values()):
        raise ConfigError(f'--splits {path} must hold a JSON object such as {{"chair/a.obj": "test"}}')
    return splits


if __name__ == "__main__":
    _cli.run(main)
