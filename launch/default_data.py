"""The default data set, made where a run asks for it and it is not there yet."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from shapediff.engine.config import DataConfig

log = logging.getLogger(__name__)

PER_CLASS, RESOLUTION, SEED = 300, 32, 0


def make_if_missing(config: DataConfig) -> None:
    """Build procedural meshes and voxelise them into `config.path` if that is the default path and nothing is there."""
    out = Path(config.path)
    if config.path != DataConfig().path or (out / "manifest.json").exists():
        return
    from shapediff.data.preparation import prepare
    from shapediff.data.shapes import write_meshes

    meshes = out.with_name(out.name + "-meshes")
    log.info("no data set at %s yet: making %d procedural meshes of each class in %s", out, PER_CLASS, meshes)
    write_meshes(meshes, per_class=PER_CLASS, seed=SEED)
    log.info("voxelising them at %d^3", RESOLUTION)
    prepare(meshes, out, resolution=RESOLUTION, workers=os.cpu_count() or 1)
