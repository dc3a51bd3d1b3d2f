"""ShapeDataset: what was written comes back, by item, by batch, by worker, at any coarser resolution."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shapediff.data.augment import mirror_coins, mirror_x, turn_choices, turn_y
from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Field
from shapediff.data.sampler import sample_seeds
from shapediff.errors import ConfigError
from shapediff.grid.morton import dense_to_morton
from tests.data.data_helpers import make_grids, write_dataset


def test_batch_is_what_was_written(tmp_path: Path) -> None:
    write_dataset(tmp_path, num=10, rows_a_shard=4)
    dataset = ShapeDataset(tmp_path)
    order = np.array([9, 0, 4, 4, 3, 8])
    batch = dataset.batch(order)
    expected = np.where(make_grids(10, resolution=8)[order], 1.0, -1.0)
    assert batch["voxels"].dtype == torch.float32 and batch["label"].dtype == torch.int64
    np.testing.assert_array_equal(batch["voxels"], dense_to_morton(expected))
    np.testing.assert_array_equal(batch["label"], order % 2)
    np.testing.assert_array_equal(dataset.labels, np.arange(10) % 2)


def test_items_are_the_rows_of_the_batch(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = ShapeDataset(tmp_path)
    batch = dataset.batch(np.arange(len(dataset)))
    for i in (0, 5, -1):
        item = dataset[i]
        assert item["voxels"].shape == (512,) and item["label"].shape == ()
        assert torch.equal(item["voxels"], batch["voxels"][i]) and item["label"] == batch["label"][i]
    with pytest.raises(IndexError):
        dataset[10]


def test_splits_part_the_shapes(tmp_path: Path) -> None:
    write_dataset(tmp_path, num=200, resolution=4)
    parts = [ShapeDataset(tmp_path, split=split) for split in ("train", "val", "test")]
    ids = [{shape.id for shape in part.shapes} for part in parts]
    assert sum(map(len, ids)) == 200 == len(set.union(*ids)) and min(map(len, ids)) > 0
    every = ShapeDataset(tmp_path)
    val = parts[1]
    places = [i for i, shape in enumerate(every.shapes) if shape.split == "val"]
    assert torch.equal(val.batch(np.arange(len(val)))["voxels"], every.batch(places)["voxels"])


@pytest.mark.parametrize("field", ["occupancy", "tsdf"])
def test_lower_resolutions_pool_the_dense_grid(tmp_path: Path, field: Field) -> None:
    write_dataset(tmp_path, resolution=16, field=field, num=3)
    fine = ShapeDataset(tmp_path)
    signal = fine.batch([0, 1, 2])["voxels"].reshape(3, -1, 8)
    coarse = ShapeDataset(tmp_path, resolution=8)
    expected = signal.amax(-1) if field == "occupancy" else signal.mean(-1)
    torch.testing.assert_close(coarse.batch([0, 1, 2])["voxels"], expected, atol=1e-6, rtol=0)
    assert coarse.resolution == 8
    assert coarse.truncation_voxels == fine.truncation_voxels / 2


@pytest.mark.parametrize(("resolution", "field"), [(8, "occupancy"), (4, "occupancy"), (8, "tsdf"), (4, "tsdf")])
def test_mirror_follows_the_seeds(tmp_path: Path, resolution: int, field: Field) -> None:
    write_dataset(tmp_path, field=field)
    dataset = ShapeDataset(tmp_path, resolution=resolution)
    seeds = sample_seeds(0, np.arange(10))
    coins = mirror_coins(seeds)
    plain = dataset.batch(np.arange(10))["voxels"]
    mirrored = dataset.batch(np.arange(10), mirror_seeds=seeds)["voxels"]
    assert 0 < coins.sum() < 10
    assert torch.equal(mirrored[~coins], plain[~coins])
    # float32 means of 8 values in another order
    torch.testing.assert_close(mirrored[coins], mirror_x(plain[coins]), atol=1e-6, rtol=0)


def test_pickled_dataset_is_small_and_equal(tmp_path: Path) -> None:
    write_dataset(tmp_path, num=20, resolution=32)
    dataset = ShapeDataset(tmp_path)
    content = pickle.dumps(dataset)
    assert len(content) < 20 * 32**3 // 8 // 4
    assert torch.equal(pickle.loads(content)[7]["voxels"], dataset[7]["voxels"])


def test_workers_of_a_loader_give_the_same(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    dataset = ShapeDataset(tmp_path)
    loader = DataLoader(dataset, batch_size=5, num_workers=1)
    voxels = torch.cat([batch["voxels"] for batch in loader])
    assert torch.equal(voxels, dataset.batch(np.arange(10))["voxels"])


def test_wrong_split_and_resolution_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    with pytest.raises(ConfigError, match="train, val, test"):
        ShapeDataset(tmp_path, split="all")  # type: ignore[arg-type]
    for resolution in (16, 6, 1):
        with pytest.raises(ConfigError, match="power of two from 2 to 8"):
            ShapeDataset(tmp_path, resolution=resolution)


@pytest.mark.parametrize("resolution", [8, 4])
def test_a_batch_is_mirrored_and_turned_as_its_seeds_say(tmp_path: Path, resolution: int) -> None:
    write_dataset(tmp_path, num=9)
    dataset = ShapeDataset(tmp_path, resolution=resolution)
    seeds, indices = sample_seeds(7, np.arange(40)), np.arange(40) % 9
    found = dataset.batch(indices, mirror_seeds=seeds, turn_seeds=seeds)["voxels"]
    plain = dataset.batch(indices)["voxels"]
    for i in range(40):
        expected = mirror_x(plain[i]) if mirror_coins(seeds[i]) else plain[i]
        assert torch.equal(found[i], turn_y(expected, int(turn_choices(seeds[i]))))
