"""Which files a data set is made of: mesh files below a folder, in archives or listed in a table, each with its class.

Layouts that are recognised, R being the folder, or an archive of it:

    R/<class>/**/a.obj                                 plain class folders; a file directly in R gets R's name as its class
    R/<class>/<train|val|test>/a.off                   ModelNet: the split is kept
    R/<train|val|test>/<class>/a.obj                   split folders, if all files lie in such
    R/<synset>/<model>/models/model_normalized.obj     ShapeNet: synset ids turned into names

An archive below R counts as a folder of its name. A top folder that bears the name of its archive is passed over.
"""

from __future__ import annotations

import csv
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shapediff.data.archives import Archive, archive_stem, is_archive, open_archive, readable_archive
from shapediff.data.manifest import Split
from shapediff.data.shapenet import SYNSETS
from shapediff.errors import DataError
from shapediff.geometry.mesh import READABLE_SUFFIXES

_SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
_MAX_CAPTION = 1000


@dataclass(frozen=True)
class Source:
    """A file to prepare: `name` is its path below the folder, with / between folders, whatever the system.

    `path` is the file, or the archive whose `member` it is. `split` and `caption` are None where nothing says; `problem` tells
    why it must not be read.
    """

    path: Path
    name: str
    class_name: str
    member: str = ""
    split: Split | None = None
    caption: str | None = None
    problem: str = ""

    @property
    def suffix(self) -> str:
        """Of the mesh file itself, in small letters."""
        return os.path.splitext(self.member or self.path.name)[1].lower()


@dataclass(frozen=True)
class _Found:
    """A file and the folders on the way to it, which say its class and split."""

    path: Path
    name: str
    folders: tuple[str, ...]
    member: str = ""
    problem: str = ""


def find_meshes(
    meshes: Path | str,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    leave_out: Path | None = None,
    cache: Path | None = None,
) -> list[Source]:
    """The mesh files of a folder, an archive or a table (.csv), by class and name; at most `limit` of each of `classes`.

    Compressed tar archives are copied to folder `cache` as plain ones. Raises DataError if `meshes` or one of the classes is
    missing, or holds no mesh, and for damaged archives.
    """
    path = Path(meshes)
    if path.suffix.lower() == ".csv":
        found = read_table(path)
    else:
        found = find_files(path, suffixes=READABLE_SUFFIXES, leave_out=leave_out, cache=cache)
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


def find_files(
    root: Path | str, *, suffixes: Collection[str], leave_out: Path | None = None, cache: Path | None = None
) -> list[Source]:
    """The files below a folder that end so, by class and name; those in archives too if there is a `cache`.

    Links are followed; hidden files and folder `leave_out` are not read. Raises DataError if there is no such folder or file.
    """
    root = Path(root)
    if not root.is_dir() and not (cache is not None and root.is_file() and is_archive(root)):
        kind = "not a folder" if cache is None else "neither a folder, nor a .zip or .tar archive, nor a .csv table"
        raise DataError(f"{root} is {kind}; give the folder that holds a folder for each class")
    found = list(_walk(root, suffixes, leave_out, cache))
    if not found:
        raise DataError(f"nothing to read in {root}; expected {root}/<class>/ with files of {', '.join(suffixes)}")
    sources = _laid_out(found, own_name=archive_stem(root.resolve()) or "shape")
    return sorted(sources, key=lambda source: (source.class_name, source.name))


def read_table(path: Path) -> list[Source]:
    """The meshes that a .csv lists, by class and name.

    Its columns are path (from the table's folder), class and, if wanted, split and caption. Raises DataError if it cannot be
    read, lacks a column or names a path twice; what is wrong with one row becomes that source's problem.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if not {"path", "class"} <= set(rows.fieldnames or ()):
                raise DataError(
                    f"{path} has the columns {rows.fieldnames}; it needs path and class, and may have split and caption"
                )
            sources = [_from_row(path.parent, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not sources:
        raise DataError(f"{path} lists no mesh")
    names = set()
    for source in sources:
        if source.name in names:
            raise DataError(f"{path} lists {source.name!r} twice")
        names.add(source.name)
    return sorted(sources, key=lambda source: (source.class_name, source.name))


def caption_of(source: Source) -> str | None:
    """What a table says, or the first line of the text file beside a mesh (chair.txt beside chair.obj); None if neither does."""
    if source.caption is not None:
        return source.caption
    try:
        if source.member:
            name = PurePosixPath(source.member).with_suffix(".txt").as_posix()
            archive = open_archive(source.path)
            text = archive.read(name, 4 * _MAX_CAPTION) if name in archive else b""
        else:
            with source.path.with_suffix(".txt").open("rb") as stream:
                text = stream.read(4 * _MAX_CAPTION)
    except (OSError, ValueError):
        return None
    lines = text.decode("utf-8-sig", errors="replace").splitlines()
    return lines[0].strip()[:_MAX_CAPTION] or None if lines else None


def _from_row(folder: Path, row: dict[str, str]) -> Source:
    name, class_name, split = ((row.get(key) or "").strip() for key in ("path", "class", "split"))
    path, problem = folder / name, ""
    if not name or not class_name:
        problem = "the table's row lacks its path or class"
    elif split and split not in _SPLIT_FOLDERS:
        problem = f"the table gives it split {split!r}; use train, val or test"
    elif path.suffix.lower() not in READABLE_SUFFIXES:
        problem = f"{path.suffix or 'a file without suffix'} cannot be read; use {', '.join(READABLE_SUFFIXES)}"
    elif not path.is_file():
        problem = "is not there"
    return Source(
        path=path,
        name=PurePosixPath(name or "?").as_posix(),
        class_name=class_name or "?",
        split=_SPLIT_FOLDERS.get(split),
        caption=(row.get("caption") or "").strip()[:_MAX_CAPTION] or None,
        problem=problem,
    )


def _laid_out(found: list[_Found], *, own_name: str) -> Iterator[Source]:
    has_split_folders = all(len(file.folders) > 1 and file.folders[0] in _SPLIT_FOLDERS for file in found)
    above = (own_name,) if own_name in SYNSETS else ()  # one class of ShapeNet alone
    for file in found:
        split, folders = None, (*above, *file.folders)
        if has_split_folders:
            split, folders = _SPLIT_FOLDERS[folders[0]], folders[1:]
        elif len(folders) > 1:
            split = _SPLIT_FOLDERS.get(folders[1])
        class_name = folders[0] if folders else own_name
        yield Source(
            path=file.path,
            name=file.name,
            class_name=SYNSETS.get(class_name, class_name),
            member=file.member,
            split=split,
            problem=file.problem,
        )


def _walk(root: Path, suffixes: Collection[str], leave_out: Path | None, cache: Path | None) -> Iterator[_Found]:
    if root.is_file():
        assert cache is not None
        yield from _in_archive(root, (), root.name, suffixes, cache, is_root=True)
        return
    visited = {leave_out.resolve()} if leave_out is not None else set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = Path(folder).resolve()
        if real in visited:  # a loop of links, or the folder to leave out
            subfolders.clear()
            continue
        visited.add(real)
        for file in files:
            path = Path(folder, file)
            if file.startswith("."):
                continue
            name = path.relative_to(root)
            if os.path.splitext(file)[1].lower() in suffixes:
                yield _Found(path=path, name=name.as_posix(), folders=name.parts[:-1])
            elif cache is not None and is_archive(path):
                yield from _in_archive(path, name.parts[:-1], name.as_posix(), suffixes, cache)


def _in_archive(
    path: Path, folders: tuple[str, ...], name: str, suffixes: Collection[str], cache: Path, *, is_root: bool = False
) -> Iterator[_Found]:
    try:
        archive: Archive = open_archive(readable_archive(path, cache))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    stem = archive_stem(path)
    for member in archive.members:
        parts = PurePosixPath(member.name.replace("\\", "/")).parts
        is_hidden = any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts)
        if is_hidden or os.path.splitext(member.name)[1].lower() not in suffixes:
            continue
        below = parts[1:] if len(parts) > 1 and parts[0].lower() == stem.lower() else parts
        yield _Found(
            path=archive.path,
            name=member.name if is_root else f"{name}/{member.name}",
            folders=(*folders, *(() if is_root else (stem,)), *below[:-1]),
            member=member.name,
            problem=member.problem,
        )
