"""A folder of generated shapes that one process or many fill, that may be stopped at any moment, and is then gone on with.

    manifest.json                 a line a shape: seed, settings, file, SHA-256; written by rank 0, now and then and at the end
    .parts/request.json           what the shapes depend on: another request is never mixed in
    .parts/rank-00000.jsonl ...   the lines of each process, appended as its shapes are done

A line is written when its file is in place, so whatever has a line is done. Processes hear nothing of each other: each does its
share of the names, and whoever reads the folder sees what all of them have done.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shapediff.errors import ConfigError, DataError
from shapediff.files import exclusive, write_json

MANIFEST_FILE = "manifest.json"
PARTS_FOLDER, REQUEST_FILE, LOCK_FILE = ".parts", "request.json", "lock"
MERGE_SECONDS, MERGE_SHARE = 30.0, 0.02
"""The manifest is brought up to date after these seconds, and as seldom as keeps it below this share of the time."""
POLL_SECONDS = 1.0
CHUNK_BYTES = 1 << 20

Line = dict[str, Any]


class Gallery:
    """The shapes of one request in `directory`, of which this process, `rank`, makes some. See `open_gallery`."""

    def __init__(self, directory: Path, *, rank: int = 0) -> None:
        self.directory = directory
        self._parts = directory / PARTS_FOLDER
        self._mine = self._parts / f"rank-{rank:05d}.jsonl"
        self._lines: dict[str, tuple[float, Line]] = {line["name"]: (0.0, line) for line in read_manifest(directory)}
        self._read_to: dict[Path, int] = {}
        self._merge_at = time.monotonic() + MERGE_SECONDS
        _end_line(self._mine)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that have no line, or whose file is gone or is not what was written."""
        self._refresh()
        return [name for name in names if name not in self._lines or not self._is_whole(self._lines[name][1])]

    def count(self, names: Iterable[str]) -> int:
        """How many of `names` have a line by now, whoever made them."""
        self._refresh()
        return sum(name in self._lines for name in names)

    def lines(self, names: Iterable[str]) -> list[Line]:
        """The lines of those of `names` that have one."""
        self._refresh()
        return [self._lines[name][1] for name in names if name in self._lines]

    def add(self, line: Line) -> None:
        """Put a shape down as done, once its file is in place."""
        text = json.dumps({"time": time.time(), **line}, ensure_ascii=False)
        with self._mine.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")

    def merge(self) -> None:
        """Bring manifest.json up to date with all that anyone has done."""
        started = time.monotonic()
        with exclusive(self._parts / LOCK_FILE, waits=True):
            for line in read_manifest(self.directory):
                self._lines.setdefault(line["name"], (0.0, line))
            self._refresh()
            shapes = [self._lines[name][1] for name in sorted(self._lines, key=_natural)]
            write_json(self.directory / MANIFEST_FILE, {"shapes": shapes})
        now = time.monotonic()
        self._merge_at = now + max(MERGE_SECONDS, (now - started) / MERGE_SHARE)

    @contextmanager
    def merged(self, *, at_end: bool) -> Iterator[None]:
        """Within, shapes are made; `merge` where that is broken off, and `at_end`."""
        try:
            yield
        except BaseException:
            self.merge()
            raise
        if at_end:
            self.merge()

    def leave(self) -> None:
        """Take back the claim on the folder where nobody has made anything: a command that was refused has not filled it."""
        with exclusive(self._parts / LOCK_FILE, waits=True):
            self._refresh()
            if not self._lines:
                (self._parts / REQUEST_FILE).unlink(missing_ok=True)
                (self.directory / MANIFEST_FILE).unlink(missing_ok=True)

    def merge_if_due(self) -> None:
        """`merge`, now and then."""
        if time.monotonic() >= self._merge_at:
            self.merge()

    def wait_for(self, names: Sequence[str], *, patience: float, on_count: Callable[[int], None]) -> int:
        """Wait until all `names` have a line, or none was added for `patience` seconds; returns how many have none."""
        last, changed = self.count(names), time.monotonic()
        while last < len(names) and time.monotonic() - changed < patience:
            time.sleep(POLL_SECONDS)
            count = self.count(names)
            if count != last:
                last, changed = count, time.monotonic()
                on_count(count)
        return len(names) - last

    def _refresh(self) -> None:
        """Take in the lines that were added since; of two of one name the later holds."""
        for path in self._parts.glob("rank-*.jsonl"):
            for line in self._new_lines(path):
                written = line.pop("time")
                if written >= self._lines.get(line["name"], (0.0,))[0]:
                    self._lines[line["name"]] = (written, line)

    def _new_lines(self, path: Path) -> list[Line]:
        with path.open("rb") as stream:
            stream.seek(self._read_to.get(path, 0))
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be in the making
        self._read_to[path] = self._read_to.get(path, 0) + len(whole)
        return [line for line in map(_parsed, whole.splitlines()) if line is not None]

    def _is_whole(self, line: Line) -> bool:
        file = line.get("file", "")
        if file is None:
            return True
        if not isinstance(file, str) or Path(file).name != file:  # a manifest may come from others
            return False
        return file_facts(self.directory / file) == {key: line.get(key) for key in ("bytes", "sha256")}


def open_gallery(directory: Path, request: Mapping[str, Any], *, rank: int = 0, beside: bool = False) -> Gallery:
    """The gallery of `request` in `directory`, new or gone on with.

    Where the folder holds shapes of another request: with `beside`, that of the first of `directory`-2, -3 ... which does not;
    otherwise ConfigError, naming what differs.
    """
    request = json.loads(json.dumps(request))
    for number in range(1, 10_000):
        folder = directory if number == 1 else directory.with_name(f"{directory.name}-{number}")
        try:
            _claim(folder, request)
            return Gallery(folder, rank=rank)
        except ConfigError:
            if not beside:
                raise
    raise ConfigError(f"{directory} and all folders beside it hold other shapes; use another --out")


def _claim(directory: Path, request: Mapping[str, Any]) -> None:
    parts = directory / PARTS_FOLDER
    with exclusive(parts / LOCK_FILE, waits=True):
        there = _read_request(parts / REQUEST_FILE)
        if there is None and read_manifest(directory):
            raise ConfigError(f"{directory} holds shapes that no command has put down there; use another --out")
        if there is None:
            write_json(parts / REQUEST_FILE, request)
            return
    different = sorted(key for key in there.keys() | request.keys() if there.get(key) != request.get(key))
    if different:
        key = different[0]
        raise ConfigError(
            f"{directory} holds shapes made with {key}={there.get(key)}, this command says {key}={request.get(key)}; "
            "use another --out"
        )


def read_manifest(directory: Path) -> list[Line]:
    """The lines of a folder's manifest; none where there is none. Raises DataError where it is not one."""
    path = directory / MANIFEST_FILE
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))["shapes"]
        return [line for line in lines if line["name"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise DataError(f"{path} is damaged ({error!r}); move it away or use another folder") from error


def merge_manifest(directory: Path, lines: Iterable[Line]) -> None:
    """Add lines to a folder's manifest, in place of those of the same name."""
    written = {line["name"]: line for line in [*read_manifest(directory), *lines]}
    write_json(directory / MANIFEST_FILE, {"shapes": list(written.values())})


def file_facts(path: Path) -> dict[str, int | str] | None:
    """Size and SHA-256 of a file; None where there is none."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
            return {"bytes": stream.tell(), "sha256": digest.hexdigest()}
    except OSError:
        return None


def _read_request(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); use another --out") from error


def _parsed(line: bytes) -> Line | None:
    """None for a line that a kill cut short."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and {"name", "time", "file"} <= value.keys() else None


def _end_line(path: Path) -> None:
    """A line that a kill cut short ends here, so that the next one is not lost with it."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    """Sorts chair_9999 before chair_10000."""
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name))
