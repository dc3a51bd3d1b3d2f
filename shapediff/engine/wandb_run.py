"""Weights & Biases, for who asks for it: imported only then, and offline where WANDB_MODE=offline says so."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shapediff.errors import ConfigError
from shapediff.files import write_text

ID_FILE = "wandb-id.txt"


def require_wandb(project: str | None) -> None:
    """Raise ConfigError, saying what to do, where a project is asked for and wandb is not installed."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"train.wandb={project} needs the package wandb: pip install wandb, or leave train.wandb out")


class WandbRun:
    """The run in `folder` as one of `project`: the same one when it is resumed, by the id that is kept there."""

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        path = folder / ID_FILE
        if not path.exists():
            write_text(path, uuid.uuid4().hex)
        self._image = wandb.Image
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=path.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by name."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Log a picture (height, width, 3) uint8."""
        self._run.log({name: self._image(pixels)}, step=step)

    def close(self) -> None:
        """Finish."""
        self._run.finish()
