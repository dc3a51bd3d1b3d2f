"""What a training run is made of: one dataclass a config group, typed and checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shapediff.config_io import from_dict, named_from_dict, named_to_dict, to_dict
from shapediff.engine.distributed import DeepSpeedConfig
from shapediff.engine.optim import OptimizerConfig
from shapediff.errors import ConfigError
from shapediff.methods import METHODS, MethodConfig, SampleConfig, VoxelDiffusionConfig
from shapediff.models import MODELS, ModelConfig, UNet3DConfig


@dataclass(frozen=True)
class DataConfig:
    """The prepared data set to train on.

    `resolution` (None: as stored) may be lower than stored. `mirror` flips half of the samples in x; `turn` turns each about y
    by 0 to 3 quarters, for shapes without a front. `balance` shows every class equally often, however many shapes it has, or
    `class_weights[name]` times as often, a whole number (0: never). `cache_latents`, for methods that train on what a frozen
    autoencoder makes of shapes, computes that once, to a file in the data set's folder latents/.
    """

    path: str = "data/shapes32"
    resolution: int | None = None
    mirror: bool = True
    turn: bool = False
    balance: bool = True
    class_weights: dict[str, int] | None = None
    cache_latents: bool = False

    def __post_init__(self) -> None:
        if self.class_weights and not self.balance:
            raise ValueError("class_weights needs balance=true")

    def label_weights(self, classes: Sequence[str]) -> dict[int, int]:
        """`class_weights` by label. Raises ConfigError for a class that the data set does not have."""
        weights = self.class_weights or {}
        unknown = set(weights) - set(classes)
        if unknown:
            raise ConfigError(f"data.class_weights names {sorted(unknown)}; the classes are {', '.join(classes)}")
        return {label: weights[name] for label, name in enumerate(classes) if name in weights}


@dataclass(frozen=True)
class LoopConfig:
    """The training loop.

    `steps` optimizer steps of `batch_size` samples over all ranks together; the run ends earlier after `max_minutes` of training,
    sheets and states apart.
    `micro_batch_size` samples a rank are computed at once (None: its whole share), the rest by gradient accumulation.
    The averaged weights of `ema_decay` are what is exported. Numbers of steps, 0 for never: `log_every`, `sample_every`
    (a contact sheet of generated shapes), `checkpoint_every`; a checkpoint is also made after
    `checkpoint_minutes` of training without one. The newest `keep_checkpoints` stay, and every step that is a multiple of
    `keep_every` (0: none).
    `init_from` starts a new run from the weights of an export, or of a run that has one; a run that is resumed ignores it.
    `compile` has torch.compile fuse what lies between matrix products, minutes at the start: for GPUs.
    `wandb` is a project of Weights & Biases to report to as well.
    A step whose loss or gradient is not finite is left out; `max_skipped` in a row end the run.
    """

    steps: int = 100_000
    batch_size: int = 64
    micro_batch_size: int | None = None
    max_minutes: float | None = None
    ema_decay: float = 0.9999
    seed: int = 0
    log_every: int = 10
    sample_every: int = 1000
    checkpoint_every: int = 1000
    checkpoint_minutes: float | None = None
    keep_checkpoints: int = 3
    keep_every: int = 0
    max_skipped: int = 10
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    init_from: str | None = None
    compile: bool = False
    wandb: str | None = None

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.keep_checkpoints, self.log_every, self.max_skipped) < 1:
            raise ValueError("steps, batch_size, log_every, keep_checkpoints and max_skipped must be at least 1")
        if self.sample_every < 0 or self.checkpoint_every < 0 or self.keep_every < 0:
            raise ValueError("sample_every, checkpoint_every and keep_every must not be negative; 0 means never")
        if self.checkpoint_minutes is not None and self.checkpoint_minutes <= 0:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be positive, or null for never")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes={self.max_minutes} must be positive, or null for no limit")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must lie between 1 and batch_size={self.batch_size}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie in [0, 1)")

    def split(self, world_size: int) -> tuple[int, int]:
        """(micro batch a rank, accumulation steps). Raises ValueError where the batch does not divide evenly."""
        per_rank, rest = divmod(self.batch_size, world_size)
        micro = min(self.micro_batch_size or per_rank, per_rank)
        if rest or per_rank % micro:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide over {world_size} ranks in micro batches of {micro or '?'}; "
                f"use a multiple of {world_size * max(micro, 1)}"
            )
        return micro, per_rank // micro


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: its folder and its groups."""

    run_dir: str = "runs/default"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=UNet3DConfig)
    method: MethodConfig = field(default_factory=VoxelDiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sampling: SampleConfig = field(default_factory=SampleConfig)

    @property
    def run_path(self) -> Path:
        """`run_dir` as a path."""
        return Path(self.run_dir)

    def to_dict(self) -> dict[str, Any]:
        """Plain settings, type names under "name": what config.yaml of a run holds."""
        plain = {key: to_dict(getattr(self, key)) for key in _PLAIN_GROUPS}
        named = {key: named_to_dict(table, getattr(self, key)) for key, table in _NAMED_GROUPS.items()}
        return {"run_dir": self.run_dir, **plain, **named}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ConfigError, naming the setting, for anything unknown or of a wrong type."""
        named: dict[str, Any] = {
            key: named_from_dict(table, data[key], path=key) for key, table in _NAMED_GROUPS.items() if key in data
        }
        rest = from_dict(_PlainGroups, {key: value for key, value in data.items() if key not in _NAMED_GROUPS})
        return cls(**{key: getattr(rest, key) for key in ("run_dir", *_PLAIN_GROUPS)}, **named)


@dataclass(frozen=True)
class _PlainGroups:
    run_dir: str = "runs/default"
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    sampling: SampleConfig = field(default_factory=SampleConfig)


_NAMED_GROUPS: dict[str, dict[str, type]] = {"model": dict(MODELS), "method": dict(METHODS)}
_PLAIN_GROUPS = ("data", "optimizer", "deepspeed", "train", "sampling")
