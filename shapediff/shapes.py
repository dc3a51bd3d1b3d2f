"""Generated shapes, and how they become files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from shapediff.config_io import unknown_name
from shapediff.errors import ConfigError, MeshError
from shapediff.gallery import file_facts, merge_manifest
from shapediff.geometry.printable import MeshOptions

if TYPE_CHECKING:
    import trimesh

MESH_FORMATS = ("obj", "stl", "ply", "glb", "3mf")
VOXEL_FORMATS = ("npz", "binvox", "vox", "schem")
_OF_SURFACES = ("surface", "smoothing", "max_faces", "height")
"""Fields of MeshOptions that voxels have nothing of; `up` is another."""


@dataclass(frozen=True)
class Shapes:
    """Generated shapes.

    `voxels` (num, R, R, R) float32 on the CPU is the signal in [-1, 1], positive inside, index order (x, y, z).
    `names`, `classes` (None where unconditional) and `seeds` have one entry a shape; `settings` says how they were made.
    """

    voxels: Float[Tensor, "num x y z"]
    names: tuple[str, ...]
    classes: tuple[str | None, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.voxels)

    def mesh(self, i: int, options: MeshOptions | None = None) -> trimesh.Trimesh:
        """Shape i as a closed manifold mesh; `options` say how, see MeshOptions. Raises MeshError where the shape is empty."""
        from shapediff.geometry.printable import printable_mesh

        return printable_mesh(self.voxels[i].numpy(), options)

    def mesh_or_none(self, i: int, options: MeshOptions | None = None) -> trimesh.Trimesh | None:
        """`mesh`, or None where the shape is empty."""
        try:
            return self.mesh(i, options)
        except MeshError:
            return None

    def meshes(self, options: MeshOptions | None = None) -> list[trimesh.Trimesh]:
        """Every shape as a closed manifold mesh. Raises MeshError where one is empty."""
        return [self.mesh(i, options) for i in range(len(self))]

    def save(self, directory: str | Path, format: str = "obj", options: MeshOptions | None = None) -> list[Path | None]:
        """Write one file a shape, a mesh or voxels, and `manifest.json`; returns the paths in order.

        The manifest has a line a shape: seed, settings, and what was measured on the mesh (see MeshReport) or counted in the
        voxels. An empty shape has no file: its path is None and its line gives the reason. A manifest that is there keeps its
        other lines, so several calls may share a directory. Raises ConfigError for an unknown format, and for options that it
        cannot follow: a .glb with z up, a surface or size of voxels.
        """
        check_format(format, options or MeshOptions())
        directory = Path(directory)
        lines = list(self.write(directory, format, options))
        merge_manifest(directory, lines)
        return [directory / line["file"] if line["file"] else None for line in lines]

    def write(
        self, directory: Path, format: str = "obj", options: MeshOptions | None = None
    ) -> Iterator[dict[str, Any]]:
        """`save` without its checks and the manifest: gives each shape's line of it as soon as its file is in place."""
        return (self._save_one(i, directory, format, options or MeshOptions()) for i in range(len(self)))

    def _save_one(self, i: int, directory: Path, format: str, options: MeshOptions) -> dict[str, Any]:
        line = {"name": self.names[i], "class": self.classes[i], "seed": self.seeds[i], "settings": self.settings}
        file = f"{self.names[i]}.{format}"
        write = self._write_mesh if format in MESH_FORMATS else self._write_voxels
        try:
            facts = write(i, directory / file, options)
        except MeshError as error:
            return {**line, "file": None, "reason": str(error)}
        return {**line, "file": file, **(file_facts(directory / file) or {}), **facts}

    def _write_mesh(self, i: int, path: Path, options: MeshOptions) -> dict[str, Any]:
        from shapediff.geometry.export import write_mesh
        from shapediff.geometry.report import check_mesh

        mesh = self.mesh(i, options)
        write_mesh(mesh, path, name=self.names[i], smooth_normals=options.surface == "smooth")
        return {**check_mesh(mesh).to_dict(), "mesh": dataclasses.asdict(options)}

    def _write_voxels(self, i: int, path: Path, options: MeshOptions) -> dict[str, Any]:
        from shapediff.geometry.printable import solid_voxels
        from shapediff.geometry.voxel_files import write_voxels

        inside = solid_voxels(self.voxels[i].numpy(), options)
        write_voxels(inside, path)
        return {"num_inside": int(inside.sum()), "resolution": len(inside)}


def joined(batches: Iterable[Shapes]) -> Shapes:
    """All batches as one; the settings are those of the first."""
    batches = list(batches)
    return Shapes(
        voxels=torch.cat([shapes.voxels for shapes in batches]),
        names=tuple(name for shapes in batches for name in shapes.names),
        classes=tuple(name for shapes in batches for name in shapes.classes),
        seeds=tuple(seed for shapes in batches for seed in shapes.seeds),
        settings=batches[0].settings,
    )


def check_format(format: str, options: MeshOptions, *, is_drawn: bool = False) -> None:
    """Raises ConfigError for a format that `Shapes.save` does not know, and options that it cannot follow.

    Voxels have no surface, size or axis of their own; where they are also drawn (`is_drawn`), the pictures have all but the axis.
    """
    if format not in MESH_FORMATS + VOXEL_FORMATS:
        raise ConfigError(unknown_name("format", format, MESH_FORMATS + VOXEL_FORMATS))
    if format == "glb" and options.up == "z":
        raise ConfigError("a .glb is y up by its standard, and viewers turn it themselves; leave out up='z'")
    unused = [name for name in ("up", *(() if is_drawn else _OF_SURFACES)) if getattr(options, name) != _default(name)]
    if format in VOXEL_FORMATS and unused:
        raise ConfigError(
            f"{', '.join(f'--{name}'.replace('_', '-') for name in unused)} would do nothing: .{format} holds voxels, "
            f"and this is for meshes; leave it out or use --format {', '.join(MESH_FORMATS)}"
        )


def _default(name: str) -> Any:
    return getattr(MeshOptions(), name)
