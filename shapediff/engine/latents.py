"""What a frozen autoencoder makes of every training shape, computed once: a file beside the shards that batches come from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64, Integer
from rich.progress import track
from torch import Tensor, nn

from shapediff.data.augment import seeds_of_versions, versions_of
from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import MANIFEST_NAME
from shapediff.engine import distributed
from shapediff.errors import DataError
from shapediff.files import exclusive, replaced_file

log = logging.getLogger(__name__)

LATENTS_FOLDER, LOCK_FILE = "latents", "lock"
ENCODED_TOGETHER = 32

Encode = Callable[[Float[Tensor, "b voxels"]], Float[Tensor, "b n"]]


class CachedLatents:
    """A data set whose batches have "latents" in place of "voxels": those that `encode` gives, in half precision.

    There is one row for each mirror image and turn that training may ask for.
    """

    def __init__(
        self, dataset: ShapeDataset, latents: Float16[np.ndarray, "n versions m"], *, versions: list[int]
    ) -> None:
        self.labels, self.classes = dataset.labels, dataset.classes
        self._latents = latents
        self._column = {version: column for column, version in enumerate(versions)}

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self,
        indices: Integer[np.ndarray, " b"],
        *,
        mirror_seeds: Int64[np.ndarray, " b"] | None = None,
        turn_seeds: Int64[np.ndarray, " b"] | None = None,
    ) -> dict[str, Tensor]:
        """As `ShapeDataset.batch` has it: {"latents": float32 (b, m), "label": int64 (b,)}."""
        versions = versions_of(len(indices), mirror_seeds=mirror_seeds, turn_seeds=turn_seeds)
        rows = self._latents[indices, [self._column[version] for version in versions.tolist()]]
        return {"latents": torch.from_numpy(rows).float(), "label": torch.from_numpy(self.labels[indices])}


def cached_latents(
    dataset: ShapeDataset,
    networks: Mapping[str, nn.Module],
    encode: Encode,
    *,
    mirror: bool,
    turn: bool,
    device: torch.device,
) -> CachedLatents:
    """The latents of `dataset` by `encode`, which uses frozen `networks`: read, or computed by rank 0 where there are none yet.

    The file is known by the weights and the data; the folder may be removed at any time. Raises DataError where it cannot be
    written.
    """
    versions = [version for version in range(8) if (mirror or version % 2 == 0) and (turn or version < 2)]
    folder = dataset.path / LATENTS_FOLDER
    path = folder / f"{_fingerprint(dataset, networks, versions)}.npy"
    if distributed.is_main():
        try:
            with exclusive(folder / LOCK_FILE, waits=True):
                if not path.is_file():
                    _write(path, dataset, encode, versions, device)
        except OSError as error:
            raise DataError(f"{folder} cannot be written ({error}); train with data.cache_latents=false") from error
    distributed.barrier()
    return CachedLatents(dataset, np.load(path, mmap_mode="r"), versions=versions)


@torch.no_grad()
def _write(path: Path, dataset: ShapeDataset, encode: Encode, versions: list[int], device: torch.device) -> None:
    for left in path.parent.glob(f".{path.stem}.*.partial.npy"):  # by a process that was killed
        left.unlink()
    out = None
    with replaced_file(path) as partial:
        for start in track(range(0, len(dataset), ENCODED_TOGETHER), "Latents of all shapes", transient=True):
            indices = np.arange(start, min(start + ENCODED_TOGETHER, len(dataset)))
            for column, version in enumerate(versions):
                seeds = seeds_of_versions(np.full(len(indices), version))
                latents = encode(dataset.batch(indices, mirror_seeds=seeds, turn_seeds=seeds)["voxels"].to(device))
                half = latents.half().cpu().numpy()
                if not np.isfinite(half).all():
                    raise DataError("latents do not fit half precision; train with data.cache_latents=false")
                if out is None:
                    shape = (len(dataset), len(versions), half.shape[1])
                    out = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
                out[indices, column] = half
        assert out is not None  # there is no data set without shapes
        out.flush()
    log.info("latents of %d shapes in %s, %.0f MiB", len(dataset), path, path.stat().st_size / 2**20)


def _fingerprint(dataset: ShapeDataset, networks: Mapping[str, nn.Module], versions: list[int]) -> str:
    """Of all that the latents depend on."""
    digest = hashlib.sha256((dataset.path / MANIFEST_NAME).read_bytes())
    digest.update(json.dumps([dataset.split, dataset.resolution, versions]).encode())
    for name, network in networks.items():
        for key, tensor in network.state_dict().items():
            digest.update(f"{name}.{key}".encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:24]
