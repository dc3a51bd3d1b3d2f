"""Networks that a run takes from another one and does not train: a copy stays in its folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE, Export, find_export, grid_settings, read_export
from shapediff.data.dataset import ShapeDataset
from shapediff.engine import distributed
from shapediff.engine.config import TrainConfig
from shapediff.engine.exporting import TAKEN_FOLDER
from shapediff.errors import CheckpointError, ConfigError
from shapediff.files import replaced_directory
from shapediff.gallery import file_facts
from shapediff.methods.base import Batch, MethodConfig
from shapediff.models.layers import PRIOR

log = logging.getLogger(__name__)

NUM_MEASURED, MEASURED_TOGETHER = 512, 32
"""How many training shapes settings are measured on."""


def with_taken(config: TrainConfig, dataset: ShapeDataset) -> TrainConfig:
    """`config` with the settings of the networks that its method takes, which are copied to `run_dir` where they are not yet.

    Raises ConfigError where it does not say whose to take, or they do not fit, and CheckpointError where there are none.
    """
    if not config.method.takes:
        return config
    folder, method = config.run_path / TAKEN_FOLDER, None
    _warn_of_another(config, folder)
    if distributed.is_main() and not (folder / WEIGHTS_FILE).is_file():
        source = _source(config)
        if source is None:
            raise ConfigError(f"this method needs {config.method.takes}")
        method = _method_of(config.method, read_export(source), source, dataset)  # before anything is written
        _copy(find_export(source), folder)
    distributed.barrier()
    if method is None:
        method = _method_of(config.method, read_export(folder), str(folder), dataset)
    return replace(config, method=method)


def _source(config: TrainConfig) -> str | None:
    """Whose networks to take: those of `init_from`, with their settings, where it holds the very ones that are named."""
    named, start = config.method.taken_from, config.train.init_from
    if named is None or start is None:
        return named or start
    there, here = read_export(start), read_export(named)
    shared = [name for name in there.method.frozen if name in here.networks]
    same = shared and all(_same(there.networks[name], here.networks[name]) for name in shared)
    return start if same else named


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether both compute the same, whatever classes they know."""
    states = ({key: value for key, value in network.state_dict().items() if key != PRIOR} for network in (one, other))
    a, b = states
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _warn_of_another(config: TrainConfig, folder: Path) -> None:
    """Say it where the run has a copy already, and the one that is named now is not that."""
    copy = folder / WEIGHTS_FILE
    if not distributed.is_main() or config.method.taken_from is None or not copy.is_file():
        return
    with suppress(CheckpointError):  # the copy is all that is needed
        source = str(_source(config))
        if file_facts(find_export(source) / WEIGHTS_FILE) != file_facts(copy):
            log.warning("%s holds other weights than %s has now; the run goes on with its own", folder, source)


def _method_of(method: MethodConfig, export: Export, source: str, dataset: ShapeDataset) -> MethodConfig:
    for name in grid_settings(dataset.field):
        there, here = getattr(export.config, name), getattr(dataset, name)
        if there != here:
            raise ConfigError(f"{source} is of {name}={there}, the data of {name}={here}")
    try:
        return method.with_taken(export.config.method, export.config.model, export.networks, _measured(dataset))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _copy(export: Path, folder: Path) -> None:
    with replaced_directory(folder) as partial:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (partial / name).write_bytes((export / name).read_bytes())


def _measured(dataset: ShapeDataset) -> Iterator[Batch]:
    """Training shapes from everywhere in the data set, as they are."""
    indices = np.unique(np.linspace(0, len(dataset) - 1, NUM_MEASURED).astype(np.int64))
    for part in np.split(indices, range(MEASURED_TOGETHER, len(indices), MEASURED_TOGETHER)):
        batch = dataset.batch(part)
        yield {"voxels": batch["voxels"], "label": batch["label"]}
