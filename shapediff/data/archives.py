"""Files inside .zip and .tar archives, read where they lie: nothing is ever unpacked under a name that an archive chose."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from shapediff.errors import DataError
from shapediff.files import replaced_file

PLAIN_SUFFIXES = (".zip", ".tar")
_COMPRESSED_TARS: dict[str, Callable[[Path], Any]] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tar.xz": lzma.open,
}
_MAX_RATIO, _ALWAYS_ALLOWED = 100, 1 << 30
"""A compressed tar that unpacks to more than this many times its size, and more than a GiB, is taken for a bomb."""

READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """A file in an archive: its name there, and what is wrong with it if it must not be read."""

    name: str
    problem: str = ""


class Archive:
    """`members` in the archive's order, and what they hold; of several of one name the last, as in a .tar that was updated."""

    def __init__(self, path: Path, members: list[Member], read: Callable[[str, int], bytes]) -> None:
        self.path, self._read = path, read
        self.members = list({member.name: member for member in members}.values())
        self._names = {member.name for member in self.members if not member.problem}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str, max_bytes: int) -> bytes:
        """The bytes of a member, up to max_bytes + 1 of them. Raises one of READ_ERRORS."""
        return self._read(name, max_bytes + 1)

    def read_beside(self, name: str, others: list[str], max_bytes: int) -> bytes | None:
        """The bytes of the first of `others`, paths from the folder of member `name`, that is a member; None if none is."""
        folder = posixpath.dirname(name)
        found = next((path for other in others if (path := posixpath.join(folder, other)) in self), None)
        return None if found is None else self.read(found, max_bytes)


def is_archive(path: Path) -> bool:
    """Whether a file's name says that it is an archive that can be read."""
    return archive_stem(path) != path.name


def archive_stem(path: Path) -> str:
    """The name without .zip, .tar, .tar.gz and so on; the name itself of what is no archive."""
    for suffix in (*_COMPRESSED_TARS, *PLAIN_SUFFIXES):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def readable_archive(path: Path, cache: Path) -> Path:
    """A .zip or .tar in which any member can be reached at once: `path`, or a compressed tar's plain copy in `cache`.

    The copy is made once for each version of the archive. Raises DataError for one that is missing, closed to us, damaged or
    a bomb.
    """
    opener = next((opener for suffix, opener in _COMPRESSED_TARS.items() if path.name.lower().endswith(suffix)), None)
    if opener is None:
        return path
    with _refusals(path):
        status = path.stat()
    identity = hashlib.sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode()).hexdigest()
    plain = cache / f"{identity[:32]}.tar"
    if not plain.exists():
        limit = max(_MAX_RATIO * status.st_size, _ALWAYS_ALLOWED)
        with replaced_file(plain) as partial, _opened(opener, path) as packed, partial.open("wb") as out:
            _copy(packed, out, limit, path)
    return plain


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """What the system refuses of an archive, apart from what it refuses of the copy."""
    try:
        yield
    except OSError as error:
        raise DataError(f"the archive {path} cannot be read: {error}") from error


def _opened(opener: Callable[[Path], Any], path: Path) -> Any:
    with _refusals(path):
        return opener(path)


def _copy(packed: IO[bytes], out: IO[bytes], limit: int, path: Path) -> None:
    copied = 0
    while True:
        try:
            block = packed.read(1 << 20)
        except READ_ERRORS as error:
            raise DataError(f"{path} is damaged: {error}") from error
        if not block:
            return
        copied += len(block)
        if copied > limit:
            raise DataError(f"{path} unpacks to more than {limit >> 20} MiB, far beyond its size; is it meant to harm?")
        out.write(block)


def open_archive(path: Path) -> Archive:
    """An archive, which stays open until it changes. Raises DataError if it is missing or damaged."""
    with _refusals(path):
        status = path.stat()
    return _open(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _open(path: Path, size: int, changed: int) -> Archive:
    try:
        return _open_zip(path) if path.suffix.lower() == ".zip" else _open_tar(path)
    except (*READ_ERRORS, tarfile.TarError) as error:
        raise DataError(f"the archive {path} cannot be read: {error}") from error


def _open_zip(path: Path) -> Archive:
    archive = zipfile.ZipFile(path)
    members = [
        Member(info.filename, _problem(info.filename, "is encrypted" if info.flag_bits & 1 else ""))
        for info in archive.infolist()
        if not info.is_dir()
    ]

    def read(name: str, num_bytes: int) -> bytes:
        with archive.open(name) as stream:
            return stream.read(num_bytes)

    return Archive(path, members, read)


def _open_tar(path: Path) -> Archive:
    places: dict[str, tuple[int, int]] = {}
    members = []
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            if info.isdir():
                continue
            problem = "" if info.isreg() and not info.issparse() else "is a link, a device or sparse"
            members.append(Member(info.name, _problem(info.name, problem)))
            places[info.name] = info.offset_data, info.size

    def read(name: str, num_bytes: int) -> bytes:
        start, size = places[name]
        with path.open("rb") as stream:
            stream.seek(start)
            return stream.read(min(size, num_bytes))

    return Archive(path, members, read)


def _problem(name: str, problem: str) -> str:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or name.startswith(("/", "\\")) or ":" in (parts[0] if parts else ""):
        return "has a name that leads out of its archive"
    return problem
