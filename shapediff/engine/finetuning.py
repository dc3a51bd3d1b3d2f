"""Starting a run from the weights of an export, with other classes or at another resolution if need be."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shapediff.checkpoint import ExportConfig, grid_settings, read_export, tensor_shapes
from shapediff.config_io import to_dict
from shapediff.engine.config import TrainConfig
from shapediff.engine.state import finished_states
from shapediff.errors import CheckpointError, ConfigError
from shapediff.models import ModelConfig, VAE3DConfig
from shapediff.models.convolution import POSITION_TABLE
from shapediff.models.layers import LABEL_ROWS, PRIOR

log = logging.getLogger(__name__)

TRAINING_ALONE = {
    *("recompute_activations", "dropout", "weighting", "min_snr_gamma", "class_dropout"),
    *("kl_weight", "critic", "num_critic_steps", "penalty_weight"),
}
"""Settings of a model or a method that say how it is trained, not what it computes: these may differ."""


def initial_weights(run: TrainConfig, config: ExportConfig) -> dict[str, dict[str, Tensor]]:
    """What the networks of `run` start from: `exported_weights` of `init_from`; nothing without it, or where there is a state."""
    path = run.train.init_from
    return {} if path is None or _has_state(run) else exported_weights(path, config)


def check_started_from(run: TrainConfig) -> None:
    """Raise CheckpointError for a run that took up no state, and not the weights of `init_from` either, for there are states."""
    if run.train.init_from is not None and _has_state(run):
        raise CheckpointError(
            f"no state of {run.run_dir} can be read; remove its folder state/ to start from {run.train.init_from} again"
        )


def _has_state(run: TrainConfig) -> bool:
    return bool(finished_states(run.run_path / "state"))


def exported_weights(path: str, config: ExportConfig) -> dict[str, dict[str, Tensor]]:
    """The weights of the export (or run) at `path` for networks that `config` trains: name -> state dict, float32 on the CPU.

    Bit for bit those of the export, but for the rows of the labels (see `rows_of_classes`) and, at another resolution, what
    there is of each cell (see `at_resolution`). Raises CheckpointError where there is no export, or where it is of another
    field, model or method, saying what differs.
    """
    export = read_export(path)
    differences = [*_differences(export.config, config)]
    if differences:
        raise CheckpointError(
            f"train.init_from={path} does not fit this run:\n  " + "\n  ".join(differences) + "\n"
            "start from an export of the same, or set these as there"
        )
    log.info("weights of %s; classes %s", path, _changes(export.config.classes, config.classes))
    trained = (name for name in export.networks if name not in export.method.frozen)
    weights = {name: export.networks[name].state_dict() for name in trained}
    shapes = tensor_shapes(config)
    for name, state in weights.items():
        for key in state:
            if key.endswith(LABEL_ROWS):
                state[key] = rows_of_classes(state[key], export.config.classes, config.classes)
            wanted = shapes[f"{name}.{key}"]
            state[key] = at_resolution(key, state[key], wanted, model=config.model)
            if state[key].shape != wanted:
                raise CheckpointError(
                    f"train.init_from={path}: {name}.{key} cannot be taken from {export.config.resolution}^3 to "
                    f"{config.resolution}^3; start from an export at {config.resolution}^3"
                )
    return weights


def at_resolution(key: str, tensor: Tensor, shape: tuple[int, ...], *, model: ModelConfig) -> Tensor:
    """`tensor` of a state dict as a network of another resolution has it, in `shape`, where that can be said.

    Position tables are interpolated; each cell of a VAE's p(z | y) goes to those that take its place, or gets their mean. All
    else is given back as it is: convolutions and attention do not know how large the grid is.
    """
    if tensor.shape == shape:
        return tensor
    if key.endswith(POSITION_TABLE):
        return F.interpolate(tensor[None], size=shape[1:], mode="trilinear")[0]
    if key == PRIOR and isinstance(model, VAE3DConfig):
        cells = tensor.unflatten(1, (2, -1, model.latent_channels))
        if shape[1] > tensor.shape[1]:
            return cells.repeat_interleave(shape[1] // tensor.shape[1], 2).flatten(1)
        return cells.unflatten(2, (-1, tensor.shape[1] // shape[1])).mean(3).flatten(1)
    return tensor


def check_same_run(run: str, there: ExportConfig, here: ExportConfig) -> None:
    """Raise ConfigError where a run that was started as `there` cannot go on as `here`: its weights would mean something else."""
    differences = _differences(there, here)
    for name in ("resolution", "classes"):
        differences += _compare(name, getattr(there, name), getattr(here, name))
    if differences:
        raise ConfigError(
            f"the run in {run} was started with other settings:\n  " + "\n  ".join(differences) + "\n"
            "resume it with those, or use another run_dir"
        )


def rows_of_classes(rows: Float[Tensor, "old d"], old: Sequence[str], new: Sequence[str]) -> Float[Tensor, "new d"]:
    """The label table for classes `new`, the null row last: a class keeps the row of its name, wherever it stood.

    A class that was not there starts as the null row: that is what the network takes for "any shape", so the first loss of a new
    class is the unconditional one. A mean of rows would be a label that it never saw, and noise is not needed to tell new classes
    apart, since each row learns from its own samples alone.
    """
    null = len(old)
    return rows[torch.tensor([*(old.index(name) if name in old else null for name in new), null])].clone()


def _changes(old: Sequence[str], new: Sequence[str]) -> str:
    parts = {
        "kept": [name for name in new if name in old],
        "new": [name for name in new if name not in old],
        "left out": [name for name in old if name not in new],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)


def _differences(there: ExportConfig, here: ExportConfig) -> list[str]:
    found = []
    for name in (name for name in grid_settings(here.field) if name != "resolution"):
        found += _compare(name, getattr(there, name), getattr(here, name))
    for name in ("model", "method"):
        a, b = getattr(there, name), getattr(here, name)
        if type(a) is not type(b):
            found += _compare(name, type(a).__name__, type(b).__name__)
            continue
        found += _compare(name, to_dict(a), to_dict(b))
    return found


def _compare(path: str, there: Any, here: Any) -> list[str]:
    """Lines `path: a there, b here`, setting by setting."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return [
            line
            for key in sorted(there.keys() | here.keys())
            if key not in TRAINING_ALONE
            for line in _compare(f"{path}.{key}", there.get(key), here.get(key))
        ]
    return [] if there == here or _nearly(there, here) else [f"{path}: {there} there, {here} here"]


def _nearly(there: Any, here: Any) -> bool:
    """Whether both are numbers measured on the same shapes, such as the scale of latents: machines differ in the last digits."""
    return (
        isinstance(there, list | tuple)
        and isinstance(here, list | tuple)
        and len(there) == len(here)
        and all(isinstance(value, float) for value in (*there, *here))
        and all(math.isclose(a, b, rel_tol=2e-3, abs_tol=1e-3) for a, b in zip(there, here, strict=True))
    )
