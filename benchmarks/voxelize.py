"""Milliseconds a mesh to a solid grid, beside trimesh and open3d on the same meshes in one run; one thread.

    python benchmarks/voxelize.py [MESH_FOLDER] [--resolutions 32 64 128]

Without a folder the procedural shapes are measured. open3d casts one ray a voxel (right on closed meshes only); trimesh
subdivides the surface and fills it. Reading and normalising are not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open3d as o3d
import trimesh

from shapediff.data.shapes import CLASSES, make_shape
from shapediff.errors import MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES, load_mesh, normalize_mesh
from shapediff.geometry.voxelize import voxelize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64, 128])
    args = parser.parse_args()
    meshes = list(_meshes(args.folder))
    print(
        f"{len(meshes)} meshes, median {int(np.median([len(m.faces) for m in meshes]))} faces; median ms a mesh (ratio to ours)"
    )
    for resolution in args.resolutions:
        ours = _median(lambda mesh, r=resolution: voxelize(mesh, resolution=r, normalize=False), meshes)
        tsdf = _median(lambda mesh, r=resolution: voxelize(mesh, resolution=r, field="tsdf", normalize=False), meshes)
        rays = _median(lambda mesh, r=resolution: _open3d_occupancy(mesh, r), meshes)
        fill = _median(lambda mesh, r=resolution: mesh.voxelized(1 / r).fill(), meshes)
        distance = _median(lambda mesh, r=resolution: _open3d_distance(mesh, r), meshes)
        print(
            f"{resolution}^3  occupancy: shapediff {ours:.1f}  open3d {rays:.1f} ({rays / ours:.1f}x)  "
            f"trimesh {fill:.1f} ({fill / ours:.1f}x)   "
            f"tsdf: shapediff {tsdf:.1f}  open3d {distance:.1f} ({distance / tsdf:.1f}x)"
        )


def _meshes(folder: Path | None) -> list[trimesh.Trimesh]:
    if folder is None:
        return [normalize_mesh(make_shape(name, seed=seed).mesh)[0] for name in CLASSES for seed in range(2)]
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE_SUFFIXES):
        try:
            mesh = normalize_mesh(load_mesh(path))[0]
            voxelize(mesh, resolution=16, normalize=False)
            found.append(mesh)
        except MeshError as error:
            print(f"left out: {path.name} {error}")
    return found


def _median(call: Callable[[trimesh.Trimesh], object], meshes: list[trimesh.Trimesh]) -> float:
    call(meshes[0])
    times = []
    for mesh in meshes:
        start = time.perf_counter()
        call(mesh)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def _scene(mesh: trimesh.Trimesh) -> o3d.t.geometry.RaycastingScene:
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(
        o3d.core.Tensor.from_numpy(mesh.vertices.astype(np.float32)),
        o3d.core.Tensor.from_numpy(mesh.faces.astype(np.uint32)),
    )
    return scene


def _centres(resolution: int) -> o3d.core.Tensor:
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5
    return o3d.core.Tensor.from_numpy(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1))


def _open3d_occupancy(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    return _scene(mesh).compute_occupancy(_centres(resolution), nthreads=1).numpy()


def _open3d_distance(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    return _scene(mesh).compute_signed_distance(_centres(resolution), nthreads=1).numpy()


if __name__ == "__main__":
    main()
