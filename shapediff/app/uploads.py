"""A visitor's mesh as voxels: read in a process of its own, which may hang, crash or want all memory at no cost but its own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shapediff.data.mesh_job import MeshLimits, PrepareSettings, make_job, read_grid
from shapediff.data.packing import unpack_signal
from shapediff.data.sources import Source
from shapediff.data.workers import JobLost, Worker
from shapediff.errors import MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES
from shapediff.grid.morton import morton_to_dense
from shapediff.pipeline import ShapePipeline

MAX_MEGABYTES, MAX_FACES, MAX_MEMORY, MAX_SECONDS = 32, 500_000, 4 << 30, 120.0
UPLOAD_SUFFIXES = tuple(suffix for suffix in READABLE_SUFFIXES if suffix != ".gltf")
"""A .gltf needs files beside it, which an upload does not bring; .glb holds them."""


class Uploads:
    """Reads the meshes that lie in `folder`, one at a time; grids are kept in `cache`."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self._folder = folder.resolve()
        self._cache = cache
        self._lock = threading.Lock()
        self._worker = Worker("shapediff.data.mesh_job", timeout=MAX_SECONDS)

    def voxels(self, path: object, pipeline: ShapePipeline, *, up: Literal["y", "z"]) -> Float[Tensor, "x y z"]:
        """The signal of an uploaded mesh at the pipeline's resolution, as the data set had it, in [-1, 1].

        Raises MeshError for a path outside the folder, a mesh over the limits, and one that cannot be voxelized.
        """
        config = pipeline.config
        band = {"truncation": config.truncation_voxels} if config.field == "tsdf" else {}
        prepare = PrepareSettings(resolution=config.resolution, field=config.field, up=up, **band)
        limits = MeshLimits(max_faces=MAX_FACES, max_bytes=MAX_MEGABYTES << 20, max_memory=MAX_MEMORY)
        source = Source(path=self._inside(path), name="your mesh", class_name="")
        with self._lock:
            answer = self._worker.ask(make_job(source, prepare, limits, self._cache))
        if isinstance(answer, JobLost):
            raise MeshError(f"your mesh was too much to read: {answer.reason.split(';')[0]}")
        reason = answer.get("fatal") or answer["line"].get("reason")
        if reason:
            raise MeshError(f"your mesh {reason.split('; raise --')[0]}")
        row, _ = read_grid(self._cache, answer["key"], prepare) or (None, None)
        if row is None:
            raise MeshError("your mesh was read, but its voxels are gone; try again")
        return morton_to_dense(torch.from_numpy(unpack_signal(row[None], field=config.field)))[0]

    def stop(self) -> None:
        """End the worker process."""
        self._worker.stop()

    def _inside(self, path: object) -> Path:
        resolved = Path(str(path)).resolve()
        if not resolved.is_relative_to(self._folder) or not resolved.is_file():
            raise MeshError("the mesh is not there any more; upload it again")
        if resolved.suffix.lower() not in UPLOAD_SUFFIXES:
            raise MeshError(
                f"{resolved.suffix or 'a file without suffix'} cannot be read; use {', '.join(UPLOAD_SUFFIXES)}"
            )
        return resolved
