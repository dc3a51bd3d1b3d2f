"""A prepared data set as a torch Dataset: memory-mapped, in fast batches, as stored or coarser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset

from shapediff.data.augment import mirror_coins, mirror_rows, turn_choices, turn_rows
from shapediff.data.manifest import SPLITS, Manifest, ShapeInfo, Split, is_resolution, read_manifest
from shapediff.data.packing import Rows, unpack_signal
from shapediff.data.shards import Shard, open_shard
from shapediff.errors import ConfigError


class ShapeDataset(Dataset[dict[str, Tensor]]):
    """The shapes of one split of a data set on disk, as signals in [-1, 1], positive inside, in Morton order.

    Attributes: `classes` (names; a label is a place in it), `labels` (n,) int64, `resolution`, `field`,
    `shapes` (the manifest's entries, in order), `truncation_voxels` in voxels of this resolution.

    Workers may be forked or spawned: the grids stay in the page cache, and a pickled dataset reopens its
    files.
    """

    def __init__(self, path: Path | str, *, split: Split | None = None, resolution: int | None = None) -> None:
        """Open the data set in folder `path`; every split if `split` is None, the stored resolution if None.

        A lower resolution is pooled on reading: occupancy by the maximum, so that thin legs survive; TSDF by
        the mean. Raises DataError if it is missing or damaged, ConfigError for a split or resolution that it
        does not have.
        """
        if split is not None and split not in SPLITS:
            raise ConfigError(f"split={split!r}; use one of {', '.join(SPLITS)}, or None for all")
        self.path, self.split = Path(path), split
        manifest = read_manifest(self.path)
        self.resolution = _checked_resolution(resolution, manifest)
        self.field = manifest.field
        self.classes = manifest.classes
        self._num_halvings = (manifest.resolution // self.resolution).bit_length() - 1
        self.truncation_voxels = manifest.truncation_voxels / 2**self._num_halvings
        self.shapes: list[ShapeInfo] = [s for s in manifest.shapes if split is None or s.split == split]
        label_of = {name: label for label, name in enumerate(manifest.classes)}
        self.labels = np.array([label_of[s.class_name] for s in self.shapes], dtype=np.int64)
        self._shards = np.array([s.shard for s in self.shapes], dtype=np.int64)
        self._rows = np.array([s.index for s in self.shapes], dtype=np.int64)
        self._manifest = manifest
        self._grids = self._open()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """{"voxels": float32 (R^3,), "label": int64 ()} of one shape. Raises IndexError outside [-n, n)."""
        return {key: value[0] for key, value in self.batch(np.array([index])).items()}

    def batch(
        self,
        indices: Integer[np.ndarray, " b"] | list[int],
        *,
        mirror_seeds: Int64[np.ndarray, " b"] | None = None,
        turn_seeds: Int64[np.ndarray, " b"] | None = None,
    ) -> dict[str, Tensor]:
        """{"voxels": float32 (b, R^3), "label": int64 (b,)} of the shapes; fresh memory.

        With `mirror_seeds`, one a sample, those whose seed says so (`augment.mirror_coins`) are mirrored in x; with
        `turn_seeds`, which may be the same, each is turned about y by 0 to 3 quarters (`augment.turn_choices`).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not -len(self) <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"index out of range for {len(self)} shapes: {int(indices.min())} to {int(indices.max())}")
        rows = self.packed(indices)
        if mirror_seeds is not None:
            mirrored = mirror_coins(mirror_seeds)
            rows[mirrored] = mirror_rows(rows[mirrored], field=self.field)
        if turn_seeds is not None:
            choices = turn_choices(turn_seeds)
            for k in (1, 2, 3):
                rows[choices == k] = turn_rows(rows[choices == k], k, field=self.field)
        signal = unpack_signal(rows, field=self.field, num_halvings=self._num_halvings)
        return {"voxels": torch.from_numpy(signal), "label": torch.from_numpy(self.labels[indices])}

    def packed(self, indices: Integer[np.ndarray, " b"]) -> Rows:
        """The rows of the shapes (b, bytes) as stored, a copy: for octrees and for checks."""
        shards, rows = self._shards[indices], self._rows[indices]
        packed = np.empty((len(shards), *self._grids[0].shape[1:]), dtype=self._grids[0].dtype)
        for shard in np.unique(shards):
            chosen = shards == shard
            packed[chosen] = self._grids[shard][rows[chosen]]
        return packed

    def _open(self) -> list[Rows]:
        shards: list[Shard] = [open_shard(self.path, self._manifest, i) for i in range(len(self._manifest.shards))]
        return [shard.grids for shard in shards]

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be pickled as a copy of the file.
        return {key: value for key, value in self.__dict__.items() if key != "_grids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._grids = self._open()


def _checked_resolution(resolution: int | None, manifest: Manifest) -> int:
    if resolution is None:
        return manifest.resolution
    if not is_resolution(resolution) or resolution > manifest.resolution:
        raise ConfigError(
            f"resolution={resolution}; the data set holds {manifest.resolution}^3: use a power of two from 2 "
            f"to {manifest.resolution}, or prepare it again with --resolution {resolution}"
        )
    return resolution
