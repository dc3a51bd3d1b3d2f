"""What was made, kept for a while: the voxels of each job in a folder with a name that cannot be guessed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import shutil
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from shapediff.app.settings import one_of
from shapediff.errors import ConfigError
from shapediff.files import replaced_file, write_json
from shapediff.gallery import MANIFEST_FILE
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS, Shapes

if TYPE_CHECKING:
    import trimesh

KEEP_SECONDS = 2 * 3600
VOXELS_FILE, FACTS_FILE, ARCHIVE = "voxels.npz", "facts.json", "shapes"
_TOKEN = re.compile(r"[0-9a-f]{32}")
_UNSAFE = re.compile(r"[^\w-]+")


class Results:
    """The results of the last two hours in `folder`, each known by its token."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def keep(self, shapes: Shapes) -> str:
        """Store shapes under names that are safe as file names; returns their token."""
        token = secrets.token_hex(16)
        folder = self._folder / token
        folder.mkdir(parents=True)
        np.savez_compressed(folder / VOXELS_FILE, voxels=shapes.voxels.numpy())
        facts = {f.name: getattr(shapes, f.name) for f in dataclasses.fields(shapes) if f.name != "voxels"}
        write_json(folder / FACTS_FILE, {**facts, "names": _file_names(shapes.names)})
        return token

    def shapes(self, token: object) -> Shapes:
        """The shapes of a token. Raises ConfigError where they are not kept (any more)."""
        folder = self._of(token)
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        with np.load(folder / VOXELS_FILE, allow_pickle=False) as arrays:
            voxels = torch.from_numpy(arrays["voxels"])
        facts |= {name: tuple(facts[name]) for name in ("names", "classes", "seeds")}
        return Shapes(voxels=voxels, **facts)

    def files(self, token: object, format: object) -> list[Path]:
        """The meshes of a result as files of that format, and all of them as one .zip with their manifest, made once."""
        folder = self._of(token) / one_of("format", format, MESH_FORMATS + VOXEL_FORMATS)
        with self._lock:
            return self._files(folder, token, str(format))

    def _files(self, folder: Path, token: object, format: str) -> list[Path]:
        if not (folder / MANIFEST_FILE).exists():
            self.shapes(token).save(folder, format=format)
        files = sorted(path for path in folder.iterdir() if path.suffix == f".{format}")
        archive = folder / f"{ARCHIVE}_{format}.zip"
        if files and not archive.exists():
            _zip([*files, folder / MANIFEST_FILE], archive)
        return [*files, archive] if files else []

    def _of(self, token: object) -> Path:
        if isinstance(token, str) and _TOKEN.fullmatch(token) and (self._folder / token / FACTS_FILE).is_file():
            return self._folder / token
        raise ConfigError("these shapes are not kept any more; generate them again")


def remove_old(folder: Path, *, seconds: float = KEEP_SECONDS) -> None:
    """Remove what lies in the folder and was last touched longer than that ago."""
    oldest = time.time() - seconds
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another visitor's job removes, too
            if path.stat().st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def meshes(shapes: Shapes) -> tuple[list[trimesh.Trimesh], list[str]]:
    """The meshes that there are, with their names: an empty shape has none."""
    made = [(shapes.mesh_or_none(i), name) for i, name in enumerate(shapes.names)]
    found = [(mesh, name) for mesh, name in made if mesh is not None]
    return [mesh for mesh, _ in found], [name for _, name in found]


def _file_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names come from checkpoints, which others make: only letters, digits, - and _ stay, and numbers keep them apart."""
    safe = [_UNSAFE.sub("_", name).strip("_")[:60] or "shape" for name in names]
    return tuple(safe) if len(set(safe)) == len(safe) else tuple(f"{name}_{i:04d}" for i, name in enumerate(safe))


def _zip(files: list[Path], path: Path) -> None:
    with replaced_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, file.name)
