"""What inspect says of a data set: near-duplicates against all pairs one by one, leaks, histograms, a page that is inert."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_tools._inspect_page import page
from shapediff.data import inspection
from shapediff.data.dataset import ShapeDataset
from shapediff.data.inspection import class_sheet, copies, inspect_dataset, near_duplicates, num_across_splits
from shapediff.data.manifest import Field, Split
from shapediff.data.packing import pack_grid, row_length
from shapediff.data.shards import ShardWriter
from shapediff.errors import ConfigError
from tests.data.data_helpers import make_grids, write_dataset
from tests.data.test_data_tools import run_tool

TRAIN_ONLY: list[Split] = ["train"]


def write_grids(
    out: Path,
    grids: np.ndarray,
    *,
    field: Field = "occupancy",
    classes: tuple[str, ...] = ("thing",),
    splits: list[Split] = TRAIN_ONLY,
    names: str = "shape",
) -> ShapeDataset:
    """The grids (n, R, R, R) as a data set, classes and splits in turn."""
    resolution = grids.shape[-1]
    writer = ShardWriter(
        out,
        resolution=resolution,
        field=field,
        truncation_voxels=3.0,
        classes=list(classes),
        shard_bytes=7 * row_length(resolution, field),
    )
    for i, grid in enumerate(grids):
        name = classes[i % len(classes)]
        row = pack_grid(grid, field=field)
        writer.add(row, id=f"{names}{i}", source=f"{i}", class_name=name, split=splits[i % len(splits)])
    writer.finish()
    return ShapeDataset(out)


def correlated_grids(num: int, *, resolution: int, seed: int) -> np.ndarray:
    """Boxes with a few voxels changed: bool (n, R, R, R), IoU within a family of boxes from 0.7 to 1."""
    rng = np.random.default_rng(seed)
    grids = np.zeros((num, resolution, resolution, resolution), dtype=bool)
    for i, grid in enumerate(grids):
        low = np.random.default_rng(i % 4).integers(0, resolution // 2, 3)
        grid[tuple(slice(a, a + resolution // 2) for a in low)] = True
        grid ^= rng.random(grid.shape) < rng.choice([0.0005, 0.002, 0.01])
    return grids


def all_pairs(insides: np.ndarray, labels: np.ndarray, *, near: float) -> dict[tuple[int, int], float]:
    """{(i, j): IoU} of the pairs of one label, from dense bool grids (n, R, R, R), one pair after the other."""
    found = {}
    for i in range(len(insides)):
        for j in range(i + 1, len(insides)):
            iou = (insides[i] & insides[j]).sum() / (insides[i] | insides[j]).sum()
            if labels[i] == labels[j] and iou >= near:
                found[i, j] = iou
    return found


def pairs_found(dataset: ShapeDataset, *, near: float) -> dict[tuple[int, int], float]:
    found = near_duplicates(dataset, near=near)
    return {(i, j): iou for (i, j), iou in zip(found.pairs.tolist(), found.iou.tolist(), strict=True)}


@pytest.mark.parametrize("block", [5, 256])
@pytest.mark.parametrize("near", [0.05, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("resolution", [2, 8, 16, 32, 64])
def test_near_pairs_are_those_of_the_slow_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolution: int, near: float, block: int
) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    monkeypatch.setattr(inspection, "_CHUNK_BYTES", 4 * resolution**3)
    few = 6 if resolution == 64 else 20
    noise = make_grids(few, resolution=resolution, seed=2)
    grids = np.concatenate([correlated_grids(3 * few, resolution=resolution, seed=1), noise])
    # Distinct ones alone: copies are named once, which has its own test.
    grids = grids[np.unique(grids.reshape(len(grids), -1), axis=0, return_index=True)[1]]
    grids = grids[grids.any((1, 2, 3))]
    dataset = write_grids(tmp_path, grids, classes=("a", "b"))
    assert pairs_found(dataset, near=near) == all_pairs(grids, dataset.labels, near=near)


@pytest.mark.parametrize("resolution", [8, 32])
def test_near_pairs_of_a_tsdf_compare_the_insides(tmp_path: Path, resolution: int) -> None:
    inside = correlated_grids(40, resolution=resolution, seed=3)
    inside[1] = inside[0]  # the same inside in another grid: a pair with an IoU of 1
    tsdf = np.random.default_rng(4).uniform(0.01, 1, inside.shape).astype(np.float32) * np.where(inside, -1, 1)
    tsdf[(tsdf > 0) & (tsdf < 0.3)] = 0.0  # 0 is outside
    dataset = write_grids(tmp_path, tsdf, field="tsdf")
    expected = all_pairs(inside, dataset.labels, near=0.8)
    assert pairs_found(dataset, near=0.8) == expected and expected[0, 1] == 1 and 20 < len(expected) < 700


def test_equal_insides_are_found_though_the_float32_bound_is_rounded(tmp_path: Path) -> None:
    # k voxels in each cell: with k = 2 all products of the bound, sqrt(2)^2 in float32, are below 2.
    cells = [(np.arange(8) < k).reshape(2, 2, 2) for k in range(1, 9)]
    inside = np.stack([np.tile(cell, (16, 16, 16)) for cell in cells])
    tsdf = np.where(np.concatenate([inside, inside]), -1.0, 1.0).astype(np.float32)
    tsdf[8:] *= 0.5
    found = pairs_found(write_grids(tmp_path, tsdf, field="tsdf"), near=1.0)
    assert found == {(i, i + 8): 1.0 for i in range(8)}


@pytest.mark.parametrize("block", [1, 256])
def test_an_iou_at_the_threshold_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", block)
    grids = np.zeros((3, 8, 8, 8), dtype=bool)
    grids.reshape(3, -1)[0, :20] = True
    grids.reshape(3, -1)[1, :19] = True
    grids.reshape(3, -1)[2, 1:19] = True  # 18/20 of the first, 18/19 = 0.947 of the second
    dataset = write_grids(tmp_path, grids)
    assert pairs_found(dataset, near=0.95) == {(0, 1): 19 / 20}
    assert set(pairs_found(dataset, near=0.9)) == {(0, 1), (0, 2), (1, 2)}


def test_two_empty_insides_are_one_pair(tmp_path: Path) -> None:
    tsdf = np.ones((3, 8, 8, 8), dtype=np.float32)
    tsdf[1, 0, 0, 0] = 0.5
    tsdf[2, 0, 0, 0] = -0.5
    assert pairs_found(write_grids(tmp_path, tsdf, field="tsdf"), near=0.01) == {(0, 1): 1.0}


def test_the_bounds_leave_little_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    exact = inspection._intersections
    monkeypatch.setattr(inspection, "_intersections", lambda d, i, j: compared.append(len(i)) or exact(d, i, j))
    dataset = write_grids(tmp_path, make_grids(60, resolution=64))
    assert not pairs_found(dataset, near=0.95) and sum(compared) == 0  # of 1770 pairs of noise, all of one volume


def test_bits_are_counted_alike_without_numpy_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.random.default_rng(0).integers(0, 2**63, (3, 5), dtype=np.uint64)
    expected = np.array([[bin(word).count("1") for word in row] for row in words.tolist()])
    np.testing.assert_array_equal(inspection._table_bit_counts(words), expected)
    dataset = write_grids(tmp_path, correlated_grids(30, resolution=32, seed=5))
    by_numpy = pairs_found(dataset, near=0.8)
    monkeypatch.setattr(inspection, "_bit_counts", inspection._table_bit_counts)
    assert by_numpy and pairs_found(dataset, near=0.8) == by_numpy


def test_groups_and_leaks_across_splits(tmp_path: Path) -> None:
    base = correlated_grids(4, resolution=16, seed=6)  # four boxes, far from one another
    near = base.copy()
    near[:, 0, 0, 0] ^= True
    nearer = near.copy()
    nearer[:, 0, 0, 1] ^= True
    grids = np.stack([base[0], near[0], nearer[0], base[1], near[1], base[2], base[2], base[3]])
    splits: list[Split] = ["train", "train", "test", "val", "val", "train", "test", "train"]
    dataset = write_grids(tmp_path, grids, splits=splits)
    found = near_duplicates(dataset, near=0.95)
    assert found.groups == [[0, 1, 2], [3, 4]] and num_across_splits(dataset, found.groups) == 1
    assert {tuple(pair) for pair in found.pairs[found.is_across].tolist()} == {(0, 2), (1, 2)}
    assert found.is_across.tolist() == [True, True, False, False]
    assert copies(dataset) == [[5, 6]] and num_across_splits(dataset, copies(dataset)) == 1


def test_a_grid_that_many_hold_is_named_once_and_across_splits_if_it_can(tmp_path: Path) -> None:
    box = correlated_grids(1, resolution=16, seed=7)[0]
    other = box.copy()
    other[0, 0, 0] ^= True
    dataset = write_grids(tmp_path, np.stack([box, box, other, box]), splits=["train", "train", "train", "test"])
    found = near_duplicates(dataset, near=0.9)
    assert found.pairs.tolist() == [[2, 3]] and found.is_across.all() and found.groups == [[0, 1, 2, 3]]
    alone = write_grids(tmp_path, np.stack([box, box, other, box]))
    assert near_duplicates(alone, near=0.9).pairs.tolist() == [[0, 2]]


def test_a_chain_is_one_group() -> None:
    order = np.random.default_rng(8).permutation(200)
    pairs = np.stack([order[:-1], order[1:]], 1)[np.random.default_rng(9).permutation(199)]
    np.testing.assert_array_equal(inspection._connected(pairs, 201), [0] * 200 + [200])


def test_fills_and_histograms(tmp_path: Path) -> None:
    grids = make_grids(21, resolution=8)
    dataset = write_grids(tmp_path, grids, classes=("a", "b"), splits=["train", "val", "test", "train"])
    report = inspect_dataset(dataset, near=0)
    assert report.near is None
    for label, summary in enumerate(report.classes):
        fills = grids[dataset.labels == label].mean((1, 2, 3))
        assert summary.histogram.sum() == len(fills) == sum(summary.num_per_split.values())
        assert summary.fill_spread == (fills.min(), np.median(fills), fills.max())
        np.testing.assert_array_equal(summary.histogram, np.histogram(fills, inspection.NUM_BINS)[0])


def test_a_class_without_shapes(tmp_path: Path) -> None:
    dataset = write_grids(tmp_path, make_grids(1, resolution=8), classes=("full", "empty"))
    report = inspect_dataset(dataset, near=0.95)
    assert report.classes[1].fill_spread is None and report.classes[1].histogram.sum() == 0
    assert class_sheet(dataset, 1, num=4) is None
    assert report.near is not None and not len(report.near.pairs) and report.near.groups == []
    assert "<h2>Near-duplicates</h2>" in page(dataset, report, sheets={})


@pytest.mark.parametrize("near", [-0.1, 1.5, float("nan")])
def test_an_iou_that_is_none_is_refused(tmp_path: Path, near: float) -> None:
    write_dataset(tmp_path)
    with pytest.raises(ConfigError, match="is no IoU"):
        inspect_dataset(ShapeDataset(tmp_path), near=near)


class _Markup(HTMLParser):
    """The tags and attributes of a page; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line"):
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()


def hostile_page(root: Path, *, draw: bool) -> str:
    grids = correlated_grids(16, resolution=16, seed=10)
    grids[4] = grids[0]
    out = root / "<b>&\"data'"
    name = "<script>alert(1)</script>"
    dataset = write_grids(
        out,
        grids,
        classes=(name, "javascript:\"'\u202e\x00\udcff", "long" * 500),
        names="\"'><img src=x onerror=alert(1)>",
        splits=["train", "test"],
    )
    sheets = {label: class_sheet(dataset, label, num=2) for label in range(3)} if draw else {}
    return page(dataset, inspect_dataset(dataset, near=0.5), sheets=sheets)


@pytest.mark.parametrize("draw", [False, True])
def test_the_page_is_inert(tmp_path: Path, draw: bool) -> None:
    if draw:
        pytest.importorskip("scipy", reason="the pictures need scipy")
    text = hostile_page(tmp_path, draw=draw)
    assert (
        "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;b&gt;&amp;&quot;data" in text
    )
    assert "&quot;&#x27;&gt;&lt;img src=x" in text and "\\u202e\\x00\\udcff" in text and "long" * 50 not in text
    markup = _Markup(text)
    assert (
        markup.tags.isdisjoint({"script", "link", "iframe", "object", "a", "form"}) and ("img" in markup.tags) == draw
    )
    assert not [name for name, _ in markup.attributes if name.startswith("on") or name == "href"]
    sources = [value or "" for name, value in markup.attributes if name == "src"]
    assert all(re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", source) for source in sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).replace("<meta http-equiv", "")
    assert "url(" not in text and "@import" not in text and "content=\"default-src 'none'; img-src data:;" in text
    assert text.encode("utf-8")


def test_the_bars_of_the_page_are_the_shapes(tmp_path: Path) -> None:
    dataset = write_grids(tmp_path, make_grids(30, resolution=8), classes=("a", "b"))
    text = page(dataset, inspect_dataset(dataset, near=0), sheets={})
    assert sum(int(count) for count in re.findall(r"<title>[^<]* to [^<]*: (\d+)</title>", text)) == 30
    assert "Near-duplicates" not in text


def test_inspect_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the pictures need scipy")
    grids = correlated_grids(8, resolution=16, seed=11)
    grids[4] = grids[0]
    grids[5] = grids[1]
    grids[5, 0, 0, 0] ^= True
    write_grids(tmp_path / "set", grids, classes=("[red]box",), splits=["train", "train", "train", "train", "test"])
    done = run_tool(
        "inspect", tmp_path / "set", "--sheets", tmp_path / "s", "--html", tmp_path / "p.html", "--near", 0.9
    )
    assert done.returncode == 0, done.stderr
    assert "1 shapes repeat another's grid; 1 of 1 groups lie across splits" in done.stdout
    assert "pairs of near-duplicates (IoU of at least 0.9)" in done.stdout and "[red]box" in done.stdout
    assert re.search(r"0\.99\d\d: shape1 \(train\), shape5 \(train\)", done.stdout) and "█" in done.stdout
    assert (tmp_path / "p.html").read_text(encoding="utf-8").count("data:image/png;base64,") >= 5
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["manifest.json", "shards"]


def test_inspect_without_pictures_writes_the_page_into_the_data_set(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    done = run_tool("inspect", tmp_path, "--num", 0, "--near", 0)
    assert done.returncode == 0 and "near-duplicates" not in done.stdout, done.stderr
    assert "<img" not in (tmp_path / "inspect.html").read_text(encoding="utf-8")
    (tmp_path / "file").write_text("")
    failed = run_tool("inspect", tmp_path, "--num", 0, "--html", tmp_path / "file" / "p.html")
    assert failed.returncode == 2 and "name other places" in failed.stdout
    refused = run_tool("inspect", tmp_path, "--near", 2)
    assert refused.returncode == 2 and "is no IoU" in refused.stdout
