"""Shards and manifest: written whole or not at all, read with suspicion, damage named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Manifest, read_manifest, split_of
from shapediff.data.packing import pack_grid
from shapediff.data.shards import ShardWriter, open_shard
from shapediff.data.verification import verify_dataset
from shapediff.errors import DataError
from tests.data.data_helpers import files_of, write_dataset


def test_manifest_round_trip(tmp_path: Path) -> None:
    written = write_dataset(tmp_path)
    assert read_manifest(tmp_path) == written
    assert [shard.num for shard in written.shards] == [4, 4, 2]


def test_strange_names_survive(tmp_path: Path) -> None:
    names = ["stuhl/größe 1.obj", "椅子/[bold]a.obj", "a/line\nbreak\t.obj", "b/raw\udcff.obj"]
    writer = ShardWriter(tmp_path, resolution=2, field="occupancy", truncation_voxels=0, classes=["椅\udcfe"])
    for name in names:
        row = pack_grid(np.ones((2, 2, 2), dtype=bool), field="occupancy")
        writer.add(row, id=name, source=name, class_name="椅\udcfe", caption="“quoted” 椅子")
    writer.finish()
    manifest = read_manifest(tmp_path)
    assert [shape.id for shape in manifest.shapes] == names
    assert manifest.classes == ["椅\udcfe"] and manifest.shapes[0].caption == "“quoted” 椅子"


def test_same_shapes_give_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a")
    write_dataset(tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_an_unfinished_rewrite_leaves_the_old_data_set_whole(tmp_path: Path) -> None:
    write_dataset(tmp_path, seed=0)
    before = ShapeDataset(tmp_path).batch(np.arange(10))["voxels"]
    writer = ShardWriter(tmp_path, resolution=8, field="occupancy", truncation_voxels=0, classes=["c"], shard_bytes=64)
    for i in range(3):
        row = pack_grid(np.full((8, 8, 8), True), field="occupancy")
        writer.add(row, id=str(i), source=str(i), class_name="c")
    assert not verify_dataset(tmp_path).damaged
    assert (ShapeDataset(tmp_path).batch(np.arange(10))["voxels"] == before).all()
    writer.finish()
    assert len(ShapeDataset(tmp_path)) == 3
    assert len(list((tmp_path / "shards").iterdir())) == 3


def test_nothing_added_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, resolution=8, field="tsdf", truncation_voxels=3, classes=["c"])
    with pytest.raises(DataError, match="every source was skipped"):
        writer.finish()


def test_splits_are_near_90_5_5_and_fixed() -> None:
    splits = [split_of(f"chair/{i}.obj") for i in range(20_000)]
    for split, chance in (("train", 0.90), ("val", 0.05), ("test", 0.05)):
        # 5 standard deviations of a binomial count
        assert abs(splits.count(split) / 20_000 - chance) < 5 * np.sqrt(chance * (1 - chance) / 20_000)
    assert [split_of(f"chair/{i}.obj") for i in (0, 7, 13, 30)] == [splits[i] for i in (0, 7, 13, 30)]


def _set(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(record: dict) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", value=2), "format_version 2.*Prepare the data set again"),
        (_set("format_version", value=True), "format_version True"),
        (_set("resolution", value=30), "power of two"),
        (_set("resolution", value=1 << 20), "power of two"),
        (_set("resolution", value="8"), "power of two"),
        (_set("field", value="mesh"), "occupancy, tsdf"),
        (_set("truncation_voxels", value=3.0), "0 for occupancy"),
        (_set("truncation_voxels", value=10**400), "a number from 0 to 1024"),
        (_set("truncation_voxels", value=-1), "a number from 0 to 1024"),
        (_set("classes", value=[]), "not empty"),
        (_set("classes", value=["class0", "class0"]), "twice"),
        (_set("classes", value=["class0", 3]), "names"),
        (_set("shards", 0, "file", value="../../etc/passwd"), "not a plain"),
        (_set("shards", 0, "file", value="/etc/a.safetensors"), "not a plain"),
        (_set("shards", 0, "file", value="..\\a.safetensors"), "not a plain"),
        (_set("shards", 0, "file", value="a.safetensors\n"), "not a plain"),
        (_set("shards", 0, "file", value=".hidden.safetensors"), "not a plain"),
        (_set("shards", 0, "num", value=-1), "integer"),
        (_set("shards", 0, "num", value=1 << 40), "integer"),
        (_set("shards", 0, "num", value=5), "does not exist|listed|damaged"),
        (_set("shards", 0, "sha256", value="zz"), "64 hexadecimal"),
        (_set("shards", 0, value="a"), "missing"),
        (_set("shapes", 0, "class", value="nope"), "not in the list"),
        (_set("shapes", 0, "shard", value=9), "does not exist"),
        (_set("shapes", 0, "index", value=4), "does not exist"),
        (_set("shapes", 1, "index", value=0), "twice"),
        (_set("shapes", 1, "id", value="class0/000.obj"), "twice"),
        (_set("shapes", 0, "split", value="all"), "train, val, test"),
        (_set("shapes", 0, "caption", value=3), "caption"),
        (_set("shapes", 0, "transform", value=[1]), "transform"),
        (_set("shapes", value={}), "not empty"),
    ],
)
def test_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "manifest.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format_version": NaN}', '{"a": ' + "9" * 9999]
)
def test_text_that_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        Manifest.from_json(text)


def test_missing_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data_tools/prepare\.py"):
        ShapeDataset(tmp_path / "nowhere")


def _shard(folder: Path, number: int) -> Path:
    return folder / "shards" / read_manifest(folder).shards[number].file


def test_flipped_bit_is_named_by_shard_and_shape(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, rows_a_shard=4)
    path = _shard(tmp_path, 1)
    content = bytearray(path.read_bytes())
    start = path.read_bytes().index(np.asarray(open_shard(tmp_path, manifest, 1).grids[2]).tobytes())
    content[start + 5] ^= 0x10
    path.write_bytes(content)
    (damage,) = verify_dataset(tmp_path).damaged
    assert damage.file == path.name and "sha256" in damage.reason
    assert damage.shapes == ["class0/006.obj"]


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_cut_off_shard_is_named(tmp_path: Path, keep: int) -> None:
    write_dataset(tmp_path)
    path = _shard(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"{path.name}.*damaged"):
        ShapeDataset(tmp_path)
    (damage,) = verify_dataset(tmp_path).damaged
    assert damage.file == path.name and len(damage.shapes) == 4


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = _shard(tmp_path, 2)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} is missing"):
        ShapeDataset(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{}",
        b'{"grids": 3}',
        b'{"grids": {"dtype": "U8", "shape": [4, 64], "data_offsets": [-64, 192]}}',
        b'{"grids": {"dtype": "U8", "shape": [4, -64], "data_offsets": [0, 256]}}',
        b'{"grids": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]}}',
        b'{"grids": {"dtype": "U8", "shape": [4, 64], "data_offsets": [0, 1e99]}}',
        b'{"grids": {"dtype": "U8", "shape": [4, 64], "data_offsets": [0, 1e999]}}',
        b'{"grids": {"dtype": "U8", "shape": [4, 1e999], "data_offsets": [0, 256]}}',
    ],
)
def test_hostile_shard_header_is_refused(tmp_path: Path, header: bytes) -> None:
    write_dataset(tmp_path)
    _shard(tmp_path, 0).write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    with pytest.raises(DataError, match="damaged"):
        ShapeDataset(tmp_path)
