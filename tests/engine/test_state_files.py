"""The files of a state: pieces come back as the whole, whoever cut them; what was changed afterwards is found out."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shapediff.engine.state_files import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    TensorFiles,
    check_file,
    rank_file,
    read_manifest,
    write_json_file,
    write_manifest,
    write_tensors,
)
from shapediff.errors import CheckpointError


def write_cut(folder: Path, whole: Tensor, cuts: list[int]) -> list[Path]:
    """`whole` as one piece a rank, cut at `cuts`; a rank with an empty piece has none."""
    paths = []
    bounds = [0, *cuts, len(whole)]
    for rank, (start, stop) in enumerate(pairwise(bounds)):
        paths.append(folder / rank_file(rank))
        pieces = {"weight/a": whole[start:stop]} if start < stop else {}
        write_tensors(
            paths[-1], {"rng": torch.tensor([rank], dtype=torch.uint8)} | pieces, dict.fromkeys(pieces, start)
        )
    return paths


@pytest.mark.parametrize("cuts", [[], [1], [5], [3, 3, 9], [2, 4, 6, 8]])
def test_any_range_is_read_from_any_cut(tmp_path: Path, cuts: list[int]) -> None:
    whole = torch.randn(10)
    files = TensorFiles(write_cut(tmp_path, whole, cuts))
    for start in range(10):
        for stop in range(start + 1, 11):
            target = torch.full((stop - start,), torch.nan)
            files.fill(target, "weight/a", start)
            assert torch.equal(target, whole[start:stop])
    assert [int(files.of_rank(rank, "rng")) for rank in range(len(cuts) + 1)] == list(range(len(cuts) + 1))  # type: ignore[arg-type]
    assert files.of_rank(len(cuts) + 1, "rng") is None
    for name, size in (("weight/b", 1), ("weight/a", 11)):
        with pytest.raises(CheckpointError, match=f"of the elements 0 to {size} of {name}"):
            files.fill(torch.empty(size), name, 0)


def test_the_files_are_safetensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).T, "b": torch.arange(5, dtype=torch.uint8)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"a": 0})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())


def write_state(folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    paths = {name: folder / name for name in (rank_file(0), PROGRESS_FILE)}
    facts = {
        rank_file(0): write_tensors(paths[rank_file(0)], {"a": torch.randn(100)}, {"a": 0}),
        PROGRESS_FILE: write_json_file(paths[PROGRESS_FILE], {"step": 1}),
    }
    write_manifest(folder, facts)
    assert read_manifest(folder) == facts
    return paths


def test_every_changed_byte_is_found_out(tmp_path: Path) -> None:
    for name, path in write_state(tmp_path).items():
        facts, good = read_manifest(tmp_path)[name], path.read_bytes()
        check_file(path, facts)
        for at in range(0, len(good), 7):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(CheckpointError, match=f"{name} is not what was written"):
                check_file(path, facts)
        for changed in (good[:-1], good + b"x", b""):
            path.write_bytes(changed)
            with pytest.raises(CheckpointError, match=f"{name} holds {len(changed)} bytes of {len(good)}"):
                check_file(path, facts)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            check_file(path, replace(facts, size=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {**data, "format_version": 2}, "format version 2, this is 1"),
        (lambda data: {"files": data["files"]}, "damaged"),
        (lambda data: {**data, "files": {PROGRESS_FILE: {"sha256": ""}}}, "damaged"),
        (lambda data: {**data, "files": {}}, "lists no progress.json"),
        (lambda data: [data], "damaged"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, change: object, message: str) -> None:
    write_state(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing: incomplete, or written by another version"):
        read_manifest(tmp_path)
