"""Shapes of whatever made them in a folder: meshes and grids, by class, at one resolution."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from shapediff.data.grid_files import GRID_SUFFIXES, READ_ERRORS, Grid, open_grid_file
from shapediff.errors import DataError, MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES, load_mesh

FOLDER_MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class FoundShape:
    """A grid (R, R, R) bool with its class and file; `is_closed` is that of the mesh, None of a grid."""

    grid: Grid
    class_name: str
    file: Path
    is_closed: bool | None


def read_shapes(
    folder: Path | str,
    *,
    classes: Sequence[str],
    resolution: int,
    num: int | None = None,
    on_skip: Callable[[Path, str], object],
) -> Iterator[FoundShape]:
    """The first `num` shapes (None: all) of each of `classes` in a folder, in the order of its names.

    What cannot be used goes to `on_skip` with the reason.

    Meshes are placed in the cube as data sets place them and made solid; grids are taken as they lie and must be of
    `resolution`. In .npy and .npz files floats with values below 0 are signals, inside above 0; others are inside above 0.5.

    The class of a file is what `manifest.json` in the folder says of it (as `shapediff.sample` writes it), else the first
    folder below that is a class, else the class that its name begins with; if there is one class alone, that one.

    Raises DataError if the folder does not exist or its manifest cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one that holds meshes or voxel grids")
    listed = _listed_classes(folder)
    counts = dict.fromkeys(classes, 0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        suffix = path.suffix.lower()
        if suffix not in (*READABLE_SUFFIXES, *GRID_SUFFIXES):
            continue
        class_name = _class_of(path.relative_to(folder), listed, classes)
        if class_name is None:
            on_skip(path, f"none of the classes {', '.join(classes)} is in its path, nor in {FOLDER_MANIFEST}")
            continue
        room = None if num is None else num - counts[class_name]
        if room == 0:
            continue
        try:
            for grid, is_closed in islice(_read(path, resolution), room):
                counts[class_name] += 1
                yield FoundShape(grid, class_name, path, is_closed)
        except (MeshError, DataError) as error:
            on_skip(path, str(error))


def _read(path: Path, resolution: int) -> Iterator[tuple[Grid, bool | None]]:
    if path.suffix.lower() in GRID_SUFFIXES:
        yield from ((grid, None) for grid in _read_grids(path, resolution))
        return
    from shapediff.geometry.voxelize import voxelize

    mesh = load_mesh(path)
    yield np.asarray(voxelize(mesh, resolution=resolution), bool), bool(mesh.is_watertight)


def _read_grids(path: Path, resolution: int) -> Iterator[Bool[np.ndarray, "r r r"]]:
    file = open_grid_file(path, threshold=None)
    if file.shape != (resolution,) * 3:
        raise DataError(f"its grids are {' x '.join(map(str, file.shape))}; the data set's are {resolution}^3")
    try:
        read = file.read()
        yield from (read(i) for i in range(file.num))
    except READ_ERRORS as error:
        raise DataError(f"cannot be read: {error}") from error


def _listed_classes(folder: Path) -> dict[str, str]:
    """{file: class} as a manifest of samples says."""
    path = folder / FOLDER_MANIFEST
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is larger than {_MAX_MANIFEST_BYTES >> 20} MiB; it is no list of shapes")
        shapes = json.loads(path.read_text(encoding="utf-8"))["shapes"]
        return {str(line["file"]): str(line["class"]) for line in shapes if line["file"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path} is no list of shapes ({error!r}); repair or remove it") from error


def _class_of(path: Path, listed: dict[str, str], classes: Sequence[str]) -> str | None:
    if path.as_posix() in listed:
        return listed[path.as_posix()] if listed[path.as_posix()] in classes else None
    for part in path.parts[:-1]:
        if part in classes:
            return part
    begins = [name for name in classes if path.stem.lower().startswith(name.lower())]
    if begins:
        return max(begins, key=len)
    return classes[0] if len(classes) == 1 else None
