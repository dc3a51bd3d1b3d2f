"""The files below a folder, links and archives included, with the folders on the way to each."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from shapediff.data.archives import Archive, archive_stem, is_archive, open_archive, readable_archive
from shapediff.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A file and the folders on the way to it, which say its class and split."""

    path: Path
    name: str
    folders: tuple[str, ...]
    member: str = ""
    problem: str = ""


def walk(root: Path, suffixes: Collection[str], leave_out: Path | None, cache: Path | None) -> Iterator[Found]:
    """The files below a folder, or in an archive, that end so; those in archives below it too if there is a `cache`.

    Links are followed, each folder once. Damaged archives below `root` and folders that cannot be entered are among the files,
    with their problem. Raises DataError if `root` itself is a damaged archive.
    """
    if root.is_file():
        assert cache is not None
        yield from _in_archive(root, (), root.name, suffixes, cache, is_root=True)
        return
    left_out = leave_out.resolve() if leave_out is not None else None
    visited: set[Path] = set()
    problems: list[Found] = []
    waiting = [root]  # links come after all true folders, so that these keep their names

    def refused(error: OSError) -> None:
        path = Path(error.filename)
        name = path.relative_to(root)
        problems.append(
            Found(path, name.as_posix(), name.parts, problem=f"the folder cannot be entered: {error.strerror}")
        )

    while waiting:
        for folder, subfolders, files in os.walk(waiting.pop(0), onerror=refused):
            real = Path(folder).resolve()
            if real in visited:
                logger.warning("left out %r: it is another name of a folder that is read", str(folder))
            if real in visited or real == left_out:
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            waiting += [Path(folder, name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
            yield from _in_folder(root, Path(folder), files, suffixes, cache)
    yield from problems


def mark_unreadable(found: list[Found], suffixes: Collection[str]) -> list[Found]:
    """Files that cannot be read with that as their problem, without those that lie in a readable format beside."""
    stems = {os.path.splitext(file.name)[0] for file in found if _suffix(file) in suffixes}
    marked = []
    for file in found:
        if file.problem or _suffix(file) in suffixes:
            marked.append(file)
        elif os.path.splitext(file.name)[0] not in stems:
            problem = f"{_suffix(file)} cannot be read; convert it to one of {', '.join(suffixes)}"
            marked.append(replace(file, problem=problem))
    return marked


def _suffix(file: Found) -> str:
    return os.path.splitext(file.name)[1].lower()


def _in_folder(
    root: Path, folder: Path, files: list[str], suffixes: Collection[str], cache: Path | None
) -> Iterator[Found]:
    for file in files:
        path = folder / file
        name = path.relative_to(root)
        if file.startswith("."):
            continue
        if os.path.splitext(file)[1].lower() in suffixes:
            yield Found(path=path, name=name.as_posix(), folders=name.parts[:-1])
        elif cache is not None and is_archive(path):
            try:
                yield from _in_archive(path, name.parts[:-1], name.as_posix(), suffixes, cache)
            except DataError as error:  # one damaged file must not end the run
                problem = str(error.__cause__).replace(f"the archive {path} ", "").replace(f"{path} ", "")
                yield Found(path, name.as_posix(), (*name.parts[:-1], archive_stem(path)), problem=problem)


def _in_archive(
    path: Path, folders: tuple[str, ...], name: str, suffixes: Collection[str], cache: Path, *, is_root: bool = False
) -> Iterator[Found]:
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
        yield Found(
            path=archive.path,
            name=member.name if is_root else f"{name}/{member.name}",
            folders=(*folders, *(() if is_root else (stem,)), *below[:-1]),
            member=member.name,
            problem=member.problem,
        )
