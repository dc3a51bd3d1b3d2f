"""The checkpoints of a folder, by names that a page can show: a visitor chooses a name and never gives a path."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

from shapediff.app.settings import one_of
from shapediff.checkpoint import CONFIG_FILE, EXPORT_FOLDER, WEIGHTS_FILE
from shapediff.errors import CheckpointError
from shapediff.pipeline import ShapePipeline

MAX_DEPTH = 3
"""How far below the folder exports are looked for: runs/NAME/export is two."""

NUM_LOADED = 2
"""How many pipelines are kept; each holds its weights."""


class Checkpoints:
    """The exports in `folder` and below, newest first, and the pipelines of those used last, on `device`."""

    def __init__(self, folder: str | Path, *, device: str | None = None) -> None:
        self.folder = Path(folder)
        self._device = device
        self._loaded: OrderedDict[tuple[Path, int], ShapePipeline] = OrderedDict()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of the exports that are there now, newest first. Raises CheckpointError where there is none."""
        found = self._found()
        if not found:
            raise CheckpointError(
                f"there is no trained model under {self.folder}; train one (`make quickstart` or "
                "`deepspeed launch/train.py`), or say where they are: --checkpoints FOLDER"
            )
        return list(found)

    def load(self, name: object) -> ShapePipeline:
        """The pipeline of the export of that name. Raises ConfigError if it is none of `names`, CheckpointError if damaged."""
        found = self._found()
        path = found[one_of("checkpoint", name, found)]
        key = (path, (path / WEIGHTS_FILE).stat().st_mtime_ns)  # a run that goes on replaces its export
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = ShapePipeline.from_pretrained(path).to(self._device)
            self._loaded.move_to_end(key)
            while len(self._loaded) > NUM_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[key]

    def _found(self) -> dict[str, Path]:
        exports = [path for path in _folders(self.folder, MAX_DEPTH) if _is_export(path)]
        exports.sort(key=lambda path: (path / CONFIG_FILE).stat().st_mtime, reverse=True)
        return {self._name(path): path for path in exports}

    def _name(self, path: Path) -> str:
        run = path.parent if path.name == EXPORT_FOLDER and path != self.folder else path
        return run.relative_to(self.folder).as_posix() if run != self.folder else self.folder.resolve().name


def _folders(folder: Path, depth: int) -> list[Path]:
    """The folder and those below, `depth` deep, hidden ones left out."""
    if not folder.is_dir():
        return []
    below = (
        [entry for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")] if depth else []
    )
    return [folder, *(path for entry in below for path in _folders(Path(entry.path), depth - 1))]


def _is_export(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()
