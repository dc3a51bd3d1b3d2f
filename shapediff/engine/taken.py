"""Networks that a run takes from another one and does not train: a copy stays in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_export, read_export
from shapediff.data.dataset import ShapeDataset
from shapediff.engine import distributed
from shapediff.engine.config import TrainConfig
from shapediff.engine.exporting import TAKEN_FOLDER
from shapediff.errors import ConfigError
from shapediff.files import replaced_directory
from shapediff.methods.base import Batch

NUM_MEASURED, MEASURED_TOGETHER = 512, 32
"""How many training shapes settings are measured on."""


def with_taken(config: TrainConfig, dataset: ShapeDataset) -> TrainConfig:
    """`config` with the settings of the networks that its method takes, which are copied to `run_dir` where they are not yet.

    Raises ConfigError where it does not say whose to take, or they do not fit, and CheckpointError where there are none.
    """
    if not config.method.takes:
        return config
    if distributed.is_main():
        _copy(config)
    distributed.barrier()
    folder = config.run_path / TAKEN_FOLDER
    export = read_export(folder)
    for name in ("resolution", "field", *(["truncation_voxels"] if dataset.field == "tsdf" else [])):
        there, here = getattr(export.config, name), getattr(dataset, name)
        if there != here:
            raise ConfigError(f"{folder}, taken as it is, is of {name}={there}, the data of {name}={here}")
    try:
        method = config.method.with_taken(
            export.config.method, export.config.model, export.networks, _measured(dataset)
        )
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    return replace(config, method=method)


def _copy(config: TrainConfig) -> None:
    folder, source = config.run_path / TAKEN_FOLDER, config.method.taken_from or config.train.init_from
    if (folder / WEIGHTS_FILE).is_file():
        return
    if source is None:
        raise ConfigError(f"this method needs {config.method.takes}")
    found = find_export(source)
    with replaced_directory(folder) as partial:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (partial / name).write_bytes((found / name).read_bytes())


def _measured(dataset: ShapeDataset) -> Iterator[Batch]:
    """Training shapes from everywhere in the data set, as they are."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, NUM_MEASURED).astype(np.int64))
    for part in np.split(indices, range(MEASURED_TOGETHER, len(indices), MEASURED_TOGETHER)):
        batch = dataset.batch(part)
        yield {"voxels": batch["voxels"], "label": batch["label"]}
