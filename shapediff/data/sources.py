"""Which files a data set is made of: the mesh files below a folder, each with its class and caption."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shapediff.errors import DataError

MESH_SUFFIXES = (".obj", ".off", ".ply", ".stl", ".glb", ".gltf")
_MAX_CAPTION = 1000


@dataclass(frozen=True)
class Source:
    """A file to prepare: `name` is its path below the folder, with / between folders, whatever the system."""

    path: Path
    name: str
    class_name: str


def find_meshes(
    meshes: Path | str,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    leave_out: Path | None = None,
) -> list[Source]:
    """The mesh files below a folder, by class and name; of `classes` alone if given, at most `limit` of each.

    Raises DataError if the folder or one of the classes is missing, or holds no mesh.
    """
    found = find_files(meshes, suffixes=MESH_SUFFIXES, leave_out=leave_out)
    present = {source.class_name for source in found}
    missing = [name for name in classes or () if name not in present]
    if missing:
        names, others = ", ".join(map(repr, missing)), ", ".join(sorted(present))
        raise DataError(f"no mesh of class {names} in {meshes}; found {others}")
    chosen: list[Source] = []
    for class_name, group in itertools.groupby(found, key=lambda source: source.class_name):
        if classes is None or class_name in classes:
            chosen.extend(itertools.islice(group, limit))
    return chosen


def find_files(folder: Path | str, *, suffixes: Collection[str], leave_out: Path | None = None) -> list[Source]:
    """The files below a folder that end so, by class and name.

    Links are followed; hidden files and folder `leave_out` are not read. The class is the first folder on the
    way; a file directly in `folder` gets that folder's own name. Raises DataError if there is no such folder
    or file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give the one that holds a folder for each class")
    found = sorted(_walk(root, suffixes, leave_out), key=lambda source: (source.class_name, source.name))
    if not found:
        raise DataError(f"nothing to read in {root}; expected {root}/<class>/ with files of {', '.join(suffixes)}")
    return found


def caption_of(mesh: Path) -> str | None:
    """The first line of the text file beside a mesh (chair.txt beside chair.obj), None if there is none."""
    path = mesh.with_suffix(".txt")
    if not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as stream:
        return stream.readline(_MAX_CAPTION).strip() or None


def _walk(root: Path, suffixes: Collection[str], leave_out: Path | None) -> Iterator[Source]:
    visited = {leave_out.resolve()} if leave_out is not None else set()
    own_name = root.resolve().name or "shape"
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = Path(folder).resolve()
        if real in visited:  # a loop of links, or the folder to leave out
            subfolders.clear()
            continue
        visited.add(real)
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in suffixes:
                path = Path(folder, file)
                name = path.relative_to(root)
                yield Source(
                    path=path,
                    name=name.as_posix(),
                    class_name=name.parts[0] if len(name.parts) > 1 else own_name,
                )
