"""What people give an edit, read from files and words: meshes and grids to signals, boxes to masks, mixtures of classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapediff.checkpoint import ExportConfig
from shapediff.errors import ConfigError, DataError, MeshError

VOXEL_SUFFIXES = (".npz", ".npy", ".binvox")


def read_voxels(
    path: str | Path, config: ExportConfig, *, up: Literal["y", "z"] = "y", is_placed: bool = False
) -> Float[Tensor, "x y z"]:
    """The signal (R, R, R) in [-1, 1] of a mesh or a grid of voxels, as the data set of that model has it.

    A mesh is voxelized to the model's resolution and field, fitted into the cube unless `is_placed` says that it is there
    already, as what sampling writes is. A grid (.npz, .npy or .binvox; FILE:3 is the fourth of many) must have the model's
    resolution. `up` is the vertical axis of either. Raises ConfigError, DataError or MeshError saying what is wrong.
    """
    path, number = split_number(str(path))
    if path.suffix.lower() in VOXEL_SUFFIXES:
        return _of_grid(_read_grid(path, number, config.resolution, up), config)
    from shapediff.geometry.export import units_a_metre
    from shapediff.geometry.mesh import load_mesh
    from shapediff.geometry.voxelize import voxelize

    try:
        mesh = load_mesh(path, up=up)
    except MeshError as error:
        raise MeshError(f"{path}: {error}") from error
    if is_placed:
        mesh.apply_scale(1 / units_a_metre(path.suffix))
    grid = voxelize(
        mesh,
        resolution=config.resolution,
        field=config.field,
        truncation=config.truncation_voxels,
        normalize=not is_placed,
    )
    return _signal(grid)


def box_mask(corners: Sequence[float], resolution: int) -> Bool[Tensor, "x y z"]:
    """The voxels whose centres lie in the box (x0, y0, z0, x1, y1, z1) of the cube [-0.5, 0.5]^3, given by opposite corners.

    Raises ConfigError where it holds no voxel.
    """
    ends = np.sort(np.reshape(np.asarray(corners, np.float64), (2, 3)), axis=0)
    centres = (np.arange(resolution) + 0.5) / resolution - 0.5
    x, y, z = ((low <= centres) & (centres <= high) for low, high in ends.T)
    mask = x[:, None, None] & y[:, None] & z
    if not mask.any():
        raise ConfigError(
            f"the box {tuple(corners)} holds no voxel; the cube goes from -0.5 to 0.5 along x, y (up) and z (front)"
        )
    return torch.from_numpy(mask)


def parse_label(text: str, classes: Sequence[str]) -> str | dict[str, float]:
    """A class as it is, or the weights of a mixture: chair:0.7,sofa:0.3. Raises ConfigError for what is neither."""
    if text in classes or ":" not in text:
        return text
    mixture: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.rpartition(":")
        try:
            mixture[name.strip()] = float(weight)
        except ValueError as error:
            raise ConfigError(f"{text!r} is no mixture of classes; write it as chair:0.7,sofa:0.3") from error
    return mixture


def split_number(text: str) -> tuple[Path, int | None]:
    """A path and the number behind its last colon, where the file would else not exist."""
    before, colon, after = text.rpartition(":")
    if colon and after.isdigit() and not Path(text).exists():
        return Path(before), int(after)
    return Path(text), None


def _read_grid(path: Path, number: int | None, resolution: int, up: Literal["y", "z"]) -> Bool[np.ndarray, "r r r"]:
    from shapediff.data.grid_files import open_grid_file
    from shapediff.data.importing import upright

    try:
        file = open_grid_file(path)
        if file.shape != (resolution,) * 3:
            raise DataError(f"its grids are {' x '.join(map(str, file.shape))}; this model makes {resolution}^3")
        if number is None and file.num > 1:
            raise DataError(f"it holds {file.num} grids; name one of them, such as {path}:0")
        if (number or 0) >= file.num:
            raise DataError(f"it holds {file.num} grids, numbers 0 to {file.num - 1}; there is no {number}")
        return upright(file.read()(number or 0), up=up)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _of_grid(grid: Bool[np.ndarray, "r r r"], config: ExportConfig) -> Float[Tensor, "x y z"]:
    if config.field == "occupancy":
        return _signal(grid)
    from shapediff.geometry.isosurface import voxels_to_mesh
    from shapediff.geometry.voxelize import signed_distance

    return _signal(signed_distance(voxels_to_mesh(grid), grid, truncation=config.truncation_voxels))


def _signal(grid: np.ndarray) -> Float[Tensor, "x y z"]:
    """2 * occupancy - 1, or minus the TSDF: positive inside."""
    signal = 2.0 * grid - 1.0 if grid.dtype == bool else -grid
    return torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32))
