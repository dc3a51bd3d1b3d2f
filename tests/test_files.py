"""Files and folders that take the place of others whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shapediff import files
from shapediff.files import replaced_directory


def contents(path: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in path.iterdir()}


def replace_by(path: Path, text: str, *, error: BaseException | None = None) -> None:
    """A folder with `text` in it; `error`: what happens while it is filled."""
    with replaced_directory(path) as partial:
        (partial / "a").write_text(text)
        if error is not None:
            raise error


def test_a_directory_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = tmp_path / "export", os.replace
    replace_by(path, "old")
    with pytest.raises(RuntimeError, match="while writing"):
        replace_by(path, "new", error=RuntimeError("while writing"))
    assert contents(path) == {"a": "old"}

    def stopped_before_the_new_one_is_in_place(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stopped_before_the_new_one_is_in_place)
    with pytest.raises(KeyboardInterrupt):
        replace_by(path, "new")
    monkeypatch.undo()
    assert contents(path) == {"a": "old"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_lost", [True, False])
def test_what_a_killed_process_of_the_same_number_left_is_no_hindrance(tmp_path: Path, is_lost: bool) -> None:
    """In containers numbers come again. Killed between the two renamings, it had moved the only good one aside."""
    path, old = tmp_path / "export", tmp_path / f".export.{os.getpid()}.old"
    for folder in (old, *(() if is_lost else (path,))):
        folder.mkdir()
        (folder / "a").write_text("before" if folder == old else "there")
    with pytest.raises(RuntimeError, match="while writing"):
        replace_by(path, "new", error=RuntimeError("while writing"))
    assert contents(path) == {"a": "before" if is_lost else "there"}
    replace_by(path, "new")
    assert contents(path) == {"a": "new"} and list(tmp_path.iterdir()) == [path]
