"""Which files a data set is made of: mesh files below a folder, in archives or listed in a table, each with its class.

Layouts that are recognised, R being the folder, or an archive of it:

    R/<class>/**/a.obj                                 plain class folders; a file directly in R gets R's name as its class
    R/<class>/<train|val|test>/a.off                   ModelNet: the split is kept
    R/<train|val|test>/<class>/a.obj                   split folders, if all files lie in such
    R/<synset>/<model>/models/model_normalized.obj     ShapeNet: synset ids turned into names

An archive below R counts as a folder of its name. A top folder that bears the name of its archive is passed over, and so is one
that holds all of a ModelNet or ShapeNet.
"""

from __future__ import annotations

import csv
import itertools
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shapediff.data.archives import READ_ERRORS, archive_stem, is_archive, open_archive
from shapediff.data.folders import Found, mark_unreadable, walk
from shapediff.data.manifest import Split
from shapediff.data.shapenet import SYNSETS
from shapediff.errors import ConfigError, DataError
from shapediff.geometry.mesh import READABLE_SUFFIXES

logger = logging.getLogger(__name__)

# fmt: off
UNREADABLE_SUFFIXES = (
    ".3dm", ".3ds", ".abc", ".amf", ".blend", ".c4d", ".dwg", ".fbx", ".iges", ".igs", ".lwo", ".ma", ".max", ".mb",
    ".skp", ".step", ".stp", ".usd", ".usda", ".usdc", ".usdz", ".vrml", ".wrl", ".x", ".x3d", ".7z", ".rar",
)
# fmt: on
"""Meshes, and archives that may hold some, which nothing here reads: said in the report rather than passed over."""

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


def find_meshes(
    meshes: Path | str,
    *,
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    leave_out: Path | None = None,
    cache: Path | None = None,
    named: Collection[str] = (),
) -> list[Source]:
    """The mesh files of a folder, an archive or a table (.csv), by class and name; at most `limit` of each of `classes`, and
    those that must not be read.

    Compressed tar archives are copied to folder `cache` as plain ones. Raises DataError if `meshes` or one of the classes is
    missing, or holds no mesh, and for damaged archives; ConfigError if one of the names `named` is no mesh's, chosen or not.
    """
    path = Path(meshes)
    if path.suffix.lower() == ".csv":
        found = read_table(path)
    else:
        found = find_files(
            path, suffixes=READABLE_SUFFIXES, unreadable=UNREADABLE_SUFFIXES, leave_out=leave_out, cache=cache
        )
    unknown = sorted(set(named) - {source.name for source in found})
    if unknown:
        names = ", ".join(map(repr, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        raise ConfigError(
            f"{len(unknown)} names in splits are of no mesh in {meshes}: {names}; "
            f"use those of the report, such as {found[0].name!r}"
        )
    present = {source.class_name for source in found}
    missing = [name for name in classes or () if name not in present]
    if missing:
        names, others = ", ".join(map(repr, missing)), ", ".join(sorted(present))
        raise DataError(f"no mesh of class {names} in {meshes}; found {others}")
    chosen: list[Source] = []
    for class_name, group in itertools.groupby(found, key=lambda source: source.class_name):
        if classes is None or class_name in classes:
            numbers = itertools.count()
            chosen += [source for source in group if source.problem or limit is None or next(numbers) < limit]
    return chosen


def find_files(
    root: Path | str,
    *,
    suffixes: Collection[str],
    unreadable: Collection[str] = (),
    leave_out: Path | None = None,
    cache: Path | None = None,
) -> list[Source]:
    """The files below a folder that end so, by class and name; those in archives too if there is a `cache`.

    What ends in one of `unreadable`, with no file of the same name beside it that can be read, is among them with that as its
    problem; so are damaged archives and folders that cannot be entered. Links are followed, each folder once; hidden files and
    folder `leave_out` are not read. Raises DataError if there is no such folder or file, or it is a damaged archive.
    """
    root = Path(root)
    if not root.is_dir() and not (cache is not None and root.is_file() and is_archive(root)):
        kind = "not a folder" if cache is None else "neither a folder, nor a .zip or .tar archive, nor a .csv table"
        raise DataError(f"{root} is {kind}; give the folder that holds a folder for each class")
    everything = walk(root, (*suffixes, *unreadable), leave_out, cache)
    found = mark_unreadable(list(everything), suffixes)
    if not found:
        raise DataError(f"nothing to read in {root}; expected {root}/<class>/ with files of {', '.join(suffixes)}")
    _hint_at_classes(found)
    sources = _laid_out(found, own_name=archive_stem(root.resolve()) or "shape")
    return sorted(sources, key=lambda source: (source.class_name, source.name))


def read_table(path: Path) -> list[Source]:
    """The meshes that a .csv lists, by class and name.

    Its columns are path (from the table's folder), class and, if wanted, split and caption, parted by commas, semicolons or
    tabs; synset ids are turned into names. Empty rows are passed over; one without a path is named by its line. Raises
    DataError if it cannot be read, lacks a column or names a path twice; what is wrong with one row becomes that source's
    problem.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            head = stream.readline()
            delimiter = max(",;\t", key=head.count)
            columns = [name.strip().lower() for name in next(csv.reader([head], delimiter=delimiter), [])]
            if not {"path", "class"} <= set(columns):
                raise DataError(
                    f"{path} has the columns {columns}; it needs path and class, and may have split and caption"
                )
            rows = csv.reader(stream, delimiter=delimiter)
            sources = [
                _from_row(path.parent, dict(zip(columns, cells, strict=False)), line=1 + rows.line_num)
                for cells in rows
                if any(cell.strip() for cell in cells)
            ]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}; save it as UTF-8") from error
    except (OSError, csv.Error) as error:
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
    """What a table says, or the first line of the text file beside a mesh (chair.txt beside chair.obj); None if neither does.

    Text that cannot be read is a warning: it must not cost the shape.
    """
    if source.caption is not None:
        return source.caption
    try:
        if source.member:
            name = os.path.splitext(source.member)[0] + ".txt"
            archive = open_archive(source.path)
            text = archive.read(name, 4 * _MAX_CAPTION) if name in archive else b""
        else:
            with source.path.with_suffix(".txt").open("rb") as stream:
                text = stream.read(4 * _MAX_CAPTION)
    except FileNotFoundError:
        return None
    except READ_ERRORS as error:
        logger.warning("no caption for %r: the text beside it cannot be read: %s", source.name, error)
        return None
    lines = text.decode("utf-8-sig", errors="replace").splitlines()
    return lines[0].strip()[:_MAX_CAPTION] or None if lines else None


def _from_row(folder: Path, row: dict[str, str], *, line: int) -> Source:
    name, class_name, split = (row.get(key, "").strip() for key in ("path", "class", "split"))
    path, problem = folder / name, ""
    if not name or not class_name:
        problem = "the table's row lacks its path or class"
    elif split and split.lower() not in _SPLIT_FOLDERS:
        problem = f"the table gives it split {split!r}; use train, val or test"
    elif path.suffix.lower() not in READABLE_SUFFIXES:
        problem = f"{path.suffix or 'a file without suffix'} cannot be read; use {', '.join(READABLE_SUFFIXES)}"
    elif not path.is_file():
        problem = "is not there"
    return Source(
        path=path,
        name=PurePosixPath(name).as_posix() if name else f"line {line}",
        class_name=SYNSETS.get(class_name, class_name) or "?",
        split=_SPLIT_FOLDERS.get(split.lower()),
        caption=row.get("caption", "").strip()[:_MAX_CAPTION] or None,
        problem=problem,
    )


def _laid_out(found: list[Found], *, own_name: str) -> Iterator[Source]:
    folders_of_sound = [file.folders for file in found if not file.problem] or [file.folders for file in found]
    num_above = int(_is_wrapped(folders_of_sound))
    has_split_folders = all(len(folders) > 1 and folders[0] in _SPLIT_FOLDERS for folders in folders_of_sound)
    above = (own_name,) if own_name in SYNSETS else ()  # one class of ShapeNet alone
    for file in found:
        split, folders = None, (*above, *file.folders[num_above:])
        if has_split_folders and len(folders) > 1:
            split, folders = _SPLIT_FOLDERS.get(folders[0]), folders[1:]
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


def _hint_at_classes(found: list[Found]) -> None:
    """Warn where the folders of the classes seem to lie one deeper than where they are looked for."""
    tops = {file.folders[:1] for file in found}
    folders = {file.folders[:2] for file in found} - tops
    name = next(iter(tops))[0] if len(tops) == 1 and () not in tops else ""
    is_class = not name or name in SYNSETS or any(below in _SPLIT_FOLDERS for _, below in folders)
    if not is_class and not _is_wrapped([file.folders for file in found]) and 1 < len(folders) <= len(found) / 3:
        logger.warning(
            "all %d meshes are of one class, %r; if the %d folders in it are the classes, give that folder, or name the archive "
            "that holds it %r",
            *(len(found), name, len(folders), name),
        )


def _is_wrapped(all_folders: list[tuple[str, ...]]) -> bool:
    """Whether all lies in one folder that is no class: below it are synsets, or classes with a split below each."""
    tops = {folders[:1] for folders in all_folders}
    if len(tops) != 1 or tops & {(), *((name,) for name in SYNSETS)}:
        return False
    return all(len(folders) > 1 and folders[1] in SYNSETS for folders in all_folders) or all(
        len(folders) > 2 and folders[1] not in _SPLIT_FOLDERS and folders[2] in _SPLIT_FOLDERS
        for folders in all_folders
    )
