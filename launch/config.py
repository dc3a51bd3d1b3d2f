"""Hydra's side of the configuration: the defaults of every dataclass, registered so that YAML and command lines refine them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from shapediff.config_io import named_to_dict, to_dict
from shapediff.engine.config import DataConfig, LoopConfig, TrainConfig
from shapediff.engine.distributed import DeepSpeedConfig
from shapediff.engine.optim import OptimizerConfig
from shapediff.errors import ConfigError
from shapediff.methods import METHODS, SampleConfig
from shapediff.models import MODELS, PRESETS


def register_defaults() -> None:
    """Store every preset as `model/NAME`, and as `GROUP/defaults...` the settings that a file of that group starts from."""
    store = ConfigStore.instance()
    for name, model in PRESETS.items():
        store.store(group="model", name=name, node=named_to_dict(MODELS, model))
    for name, method in METHODS.items():
        store.store(group="method", name=f"defaults_{name}", node=named_to_dict(METHODS, method()))
    groups = {
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "deepspeed": DeepSpeedConfig,
        "train": LoopConfig,
        "sampling": SampleConfig,
    }
    for group, config in groups.items():
        store.store(group=group, name="defaults", node=to_dict(config()))


def to_config(settings: DictConfig) -> TrainConfig:
    """The typed configuration. Raises ConfigError, naming the setting, for anything unknown or of a wrong type."""
    plain = OmegaConf.to_container(settings, resolve=True)
    return TrainConfig.from_dict({key: value for key, value in plain.items() if key != "experiment"})  # type: ignore[union-attr, misc]


def compose(settings: Sequence[str], *, experiment: str) -> TrainConfig:
    """What launch/train.py would train with these settings; `experiment` where they name none.

    Raises ConfigError, naming the setting, for anything unknown or of a wrong type.
    """
    register_defaults()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return to_config(hydra.compose("train", overrides=with_experiment(settings, experiment)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error)) from error


def with_experiment(settings: Sequence[str], experiment: str) -> list[str]:
    """The settings, with `experiment` among them where they name none."""
    named = any(setting.startswith("experiment=") for setting in settings)
    return [*settings] if named else [*settings, f"experiment={experiment}"]


CONF = Path(__file__).resolve().parents[1] / "conf"

HARDWARE_EXPERIMENT = "gpu" if torch.cuda.is_available() else "cpu"
"""The experiment that suits this machine, for a run that names none."""
