"""Mesh to solid grid and to TSDF beside the field's libraries: the same meshes, one core, one run.

    python benchmarks/voxelize.py [MESH_FOLDER] [--resolutions 64 128] [--out FILE.md]

Prints milliseconds a mesh (median over the meshes, best of three runs of each under 0.2 s), the ratio to shapediff, and how
well each fills: the IoU with the generalised winding
number (> 0.5; Jacobson et al. 2013, libigl) at voxel centres, lowest over closed meshes and median over open ones. Voxels
whose centre lies within 0.001 voxel of the surface, where the winding number has a jump, are left out. TSDFs are compared
with the exact distance (libigl's closest point) within the band. Without a folder the procedural shapes are measured.

Needs: pip install pyvista point-cloud-utils meshlib libigl (beside shapediff[mesh]); a library that is not there is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core for every library, whatever its threads

import numpy as np
import trimesh

from shapediff.data.shapes import CLASSES, make_shape
from shapediff.errors import MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES, load_mesh, normalize_mesh
from shapediff.geometry.voxelize import voxelize

BAND = 3.0
ON_SURFACE = 1e-3


@dataclass(frozen=True)
class Case:
    """A mesh in the unit cube."""

    name: str
    mesh: trimesh.Trimesh
    is_closed: bool


@dataclass(frozen=True)
class Method:
    """`call(mesh, resolution)` gives a (R, R, R) grid; `package` is the module that it needs."""

    name: str
    package: str
    call: Callable[[trimesh.Trimesh, int], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    cases = _cases(args.folder)
    lines = [*_head(cases), *(_stages_table(args.folder, cases, 64) if args.folder else [])]
    print(*lines, sep="\n")
    for resolution in args.resolutions:
        for table in (_occupancy_table, _tsdf_table):
            part = table(cases, resolution)
            print(*part, sep="\n", flush=True)
            lines += part
    lines += (part := [*_open_meshes(cases, 64), *_memory_line(cases, 256)])
    print(*part, sep="\n")
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(cases: list[Case]) -> list[str]:
    faces = [len(case.mesh.faces) for case in cases]
    return [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{len(cases)} meshes of {min(faces)} to {max(faces)} faces (median {int(np.median(faces))}), "
        f"{sum(case.is_closed for case in cases)} of them closed; "
        f"one core of {_processor()}, Python {platform.python_version()}.",
    ]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _stages_table(folder: Path, cases: list[Case], resolution: int) -> list[str]:
    """From the file on disk to the grid on disk, packed bits; every library reads, normalises and fills by itself."""
    rows, base = [], 0.0
    for name, package, read, method in STAGES:
        if importlib.util.find_spec(package) is None:
            continue
        times: dict[str, list[float]] = {"read": [], "normalise": [], "voxelise": [], "write": []}
        for case in cases:
            path, clock = folder / case.name, [time.perf_counter()]
            mesh = read(path)
            clock.append(time.perf_counter())
            mesh = normalize_mesh(mesh)[0]
            clock.append(time.perf_counter())
            grid = method(mesh, resolution)
            clock.append(time.perf_counter())
            np.save("/dev/shm/grid.npy" if os.path.isdir("/dev/shm") else os.devnull, np.packbits(grid))
            clock.append(time.perf_counter())
            for stage, seconds in zip(times, np.diff(clock), strict=True):
                times[stage].append(1000 * seconds)
        total = float(np.median(np.sum(list(times.values()), axis=0)))
        base = base or total
        stages = " | ".join(f"{np.median(values):.2f}" for values in times.values())
        rows.append(f"| {name} | {stages} | {total:.2f} | {total / base:.1f} |")
    return [
        "",
        f"### File to grid at {resolution}^3, ms a mesh",
        "",
        "| | read | normalise | voxelise | write | all | times ours |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _open_meshes(cases: list[Case], resolution: int) -> list[str]:
    scores = {}
    for case in cases:
        if not case.is_closed:
            counts = _distance(case.mesh, resolution, 0.1) >= ON_SURFACE
            grid = voxelize(case.mesh, resolution=resolution, normalize=False)
            scores[case.name] = _iou(grid, _inside_by_winding(case.mesh, resolution), counts)
    listed = ", ".join(f"{name} {score:.3f}" for name, score in sorted(scores.items(), key=lambda item: item[1]))
    return ["", f"### Open meshes at {resolution}^3: IoU with the winding number", "", listed]


def _memory_line(cases: list[Case], resolution: int) -> list[str]:
    """In a process of its own, since the peak is that of a whole life. Linux only."""
    if not Path("/proc/self/status").exists():
        return []
    code = (
        "import sys, trimesh\n"
        "from pathlib import Path\n"
        "from shapediff.geometry.voxelize import voxelize\n"
        "def peak():\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(line.split()[1] for line in lines if 'VmHWM' in line)\n"
        "mesh = trimesh.load_mesh(sys.argv[1], process=False)\n"
        "voxelize(mesh, resolution=16)\n"
        "before = peak()\n"
        f"voxelize(mesh, resolution={resolution})\n"
        "print(before, peak())\n"
    )
    largest = max(cases, key=lambda case: len(case.mesh.faces))
    with tempfile.TemporaryDirectory() as folder:
        largest.mesh.export(f"{folder}/a.ply")
        done = subprocess.run(
            [sys.executable, "-c", code, f"{folder}/a.ply"], capture_output=True, text=True, check=True
        )
    before, peak = (int(word) / 2**20 for word in done.stdout.split())
    return [
        "",
        f"Memory at {resolution}^3, occupancy of {largest.name} ({len(largest.mesh.faces)} faces): peak of the process "
        f"{peak:.2f} GiB, of which {before:.2f} are Python and its libraries.",
    ]


def _occupancy_table(cases: list[Case], resolution: int) -> list[str]:
    ours = Method("shapediff", "shapediff", lambda mesh, r: voxelize(mesh, resolution=r, normalize=False))
    references = {case.name: _inside_by_winding(case.mesh, resolution) for case in cases}
    undecided = {case.name: _distance(case.mesh, resolution, 0.1) < ON_SURFACE for case in cases}
    rows, base = [], 0.0
    for method in [ours, *(m for m in OCCUPANCY if _is_there(m))]:
        grids, milliseconds = _run(method, cases, resolution)
        base = base or milliseconds
        scores = {case.name: _iou(grids[case.name], references[case.name], ~undecided[case.name]) for case in cases}
        closed = [scores[case.name] for case in cases if case.is_closed]
        open_ = [scores[case.name] for case in cases if not case.is_closed]
        rows.append(
            f"| {method.name} | {milliseconds:.2f} | {milliseconds / base:.1f} | "
            f"{min(closed, default=np.nan):.4f} | {np.mean(np.array(closed) >= 0.99):.0%} | "
            f"{np.median(open_) if open_ else np.nan:.3f} | {np.mean(np.array(open_) >= 0.9) if open_ else np.nan:.0%} |"
        )
    return [
        "",
        f"### Occupancy at {resolution}^3",
        "",
        "| | ms a mesh | times ours | IoU, closed meshes: lowest | at least 0.99 | open meshes: median | at least 0.9 |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


def _tsdf_table(cases: list[Case], resolution: int) -> list[str]:
    ours = Method("shapediff", "shapediff", _our_distance)
    exact = {case.name: _distance(case.mesh, resolution, BAND) for case in cases if len(case.mesh.faces) < 60_000}
    rows, base = [], 0.0
    for method in [ours, *(m for m in DISTANCE if _is_there(m))]:
        grids, milliseconds = _run(method, cases, resolution)
        base = base or milliseconds
        errors = [_band_error(grids[name], distance) for name, distance in exact.items()]
        rows.append(
            f"| {method.name} | {milliseconds:.1f} | {milliseconds / base:.1f} | {np.mean(errors):.1e} | {np.max(errors):.1e} |"
        )
    return [
        "",
        f"### TSDF at {resolution}^3, band of {BAND:g} voxels",
        "",
        "| | ms a mesh | times ours | mean error of the distance in the band, voxels | of the worst mesh |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _run(method: Method, cases: list[Case], resolution: int) -> tuple[dict[str, np.ndarray], float]:
    method.call(cases[0].mesh, resolution)
    grids, times = {}, []
    for case in cases:
        grids[case.name], seconds = _timed(lambda mesh=case.mesh: method.call(mesh, resolution))
        times.append(seconds)
        grids[case.name] = grids[case.name].astype(bool if grids[case.name].dtype == bool else np.float32)
    return grids, 1000 * float(np.median(times))


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
        if best > 0.2:
            break
    return result, best


def _cases(folder: Path | None) -> list[Case]:
    if folder is None:
        shapes = [(f"{name}{seed}", make_shape(name, seed=seed).mesh) for name in CLASSES for seed in range(2)]
        return [Case(name, normalize_mesh(mesh)[0], mesh.is_watertight) for name, mesh in shapes]
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in READABLE_SUFFIXES):
        try:
            mesh = normalize_mesh(load_mesh(path))[0]
            voxelize(mesh, resolution=64, normalize=False)
            found.append(Case(path.relative_to(folder).as_posix(), mesh, bool(mesh.is_watertight and mesh.is_volume)))
        except MeshError as error:
            print(f"left out: {path.name} {error}")
    return found


def _is_there(method: Method) -> bool:
    return importlib.util.find_spec(method.package) is not None


@lru_cache(maxsize=4)
def _centres(resolution: int) -> np.ndarray:
    axis = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def _iou(one: np.ndarray, other: np.ndarray, counts: np.ndarray) -> float:
    return float((one & other & counts).sum() / max((one | other)[counts].sum(), 1))


# -- references


def _inside_by_winding(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    import igl

    points = _centres(resolution).reshape(-1, 3)
    winding = igl.fast_winding_number(mesh.vertices.astype(float), mesh.faces.astype(np.int64), points)
    return winding.reshape((resolution,) * 3) > 0.5


def _distance(mesh: trimesh.Trimesh, resolution: int, band: float) -> np.ndarray:
    """Unsigned, in voxels, exact below `band`, inf beyond."""
    import igl

    points = _centres(resolution).reshape(-1, 3)
    near = _near_surface(mesh, resolution, band).ravel()
    distance = np.full(len(points), np.inf)
    distance[near] = np.sqrt(
        igl.point_mesh_squared_distance(points[near], mesh.vertices.astype(float), mesh.faces.astype(np.int64))[0]
    )
    distance *= resolution
    return np.where(distance < band, distance, np.inf).reshape((resolution,) * 3)


def _near_surface(mesh: trimesh.Trimesh, resolution: int, band: float) -> np.ndarray:
    """Voxels that may lie within `band`: the bounding boxes of small pieces of the triangles, grown by it."""
    near = np.zeros((resolution,) * 3, bool)
    triangles = (mesh.triangles + 0.5) * resolution
    while len(triangles):
        is_small = np.ptp(triangles, axis=1).max(1) < 4
        for piece in triangles[is_small]:
            low = np.maximum(np.floor(piece.min(0) - band - 1).astype(int), 0)
            high = np.maximum(np.ceil(piece.max(0) + band + 1).astype(int), 0)
            near[tuple(map(slice, low, high))] = True
        a, b, c = triangles[~is_small].transpose(1, 0, 2)
        d, e, f = (a + b) / 2, (b + c) / 2, (c + a) / 2
        triangles = np.concatenate([np.stack(t, 1) for t in ((a, d, f), (d, b, e), (f, e, c), (d, e, f))])
    return near


def _band_error(distance: np.ndarray, exact: np.ndarray) -> float:
    """Mean absolute difference of the unsigned distances, in voxels, where the exact one is within the band."""
    in_band = exact < BAND - 0.01
    return float(np.abs(np.abs(distance[in_band]) - exact[in_band]).mean())


def _our_distance(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    return BAND * voxelize(mesh, resolution=resolution, field="tsdf", truncation=BAND, normalize=False)


# -- the others


def _trimesh_fill(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    # trimesh puts voxel centres at whole multiples of the pitch.
    pitch = 1 / resolution
    shifted = trimesh.Trimesh(mesh.vertices + (resolution // 2 - 0.5) * pitch, mesh.faces, process=False)
    filled = shifted.voxelized(pitch).fill()
    low = np.rint(filled.translation / pitch).astype(int)
    grid = np.zeros((resolution + 4,) * 3, bool)
    grid[tuple(slice(i + 2, i + 2 + n) for i, n in zip(low, filled.shape, strict=True))] = filled.matrix
    return grid[2:-2, 2:-2, 2:-2]


def _scene(mesh: trimesh.Trimesh):
    import open3d as o3d

    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(mesh.vertices.astype(np.float32), mesh.faces.astype(np.uint32))
    return scene


def _open3d_occupancy(num_rays: int) -> Callable[[trimesh.Trimesh, int], np.ndarray]:
    def call(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
        points = _centres(resolution).astype(np.float32)
        return _scene(mesh).compute_occupancy(points, nthreads=1, nsamples=num_rays).numpy() > 0.5

    return call


def _open3d_distance(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    points = _centres(resolution).astype(np.float32)
    return resolution * _scene(mesh).compute_signed_distance(points, nthreads=1).numpy()


def _pyvista_mask(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    import pyvista

    faces = np.column_stack([np.full(len(mesh.faces), 3), mesh.faces])
    surface = pyvista.PolyData(np.asarray(mesh.vertices, float), faces)
    volume = pyvista.ImageData(
        dimensions=(resolution,) * 3, spacing=(1 / resolution,) * 3, origin=(0.5 / resolution - 0.5,) * 3
    )
    mask = surface.voxelize_binary_mask(reference_volume=volume)["mask"]
    return np.asarray(mask).reshape((resolution,) * 3, order="F") > 0


def _pcu_fill(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    """Its surface voxels, and what cannot be reached from outside past them."""
    import point_cloud_utils as pcu

    pitch = 1 / resolution
    cells = pcu.voxelize_triangle_mesh(
        np.asarray(mesh.vertices, float), mesh.faces.astype(np.int64), pitch, np.full(3, -0.5)
    )
    grid = np.zeros((resolution + 2,) * 3, np.int32)
    grid[tuple((np.clip(cells, 0, resolution - 1) + 1).T)] = 1
    return pcu.flood_fill_3d(grid, [0, 0, 0], 2)[1:-1, 1:-1, 1:-1] != 2


def _pcu_winding(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
    import point_cloud_utils as pcu

    points = _centres(resolution).reshape(-1, 3)
    winding = pcu.triangle_soup_fast_winding_number(
        np.asarray(mesh.vertices, float), mesh.faces.astype(np.int64), points
    )
    return winding.reshape((resolution,) * 3) > 0.5


def _meshlib_distance(sign: str) -> Callable[[trimesh.Trimesh, int], np.ndarray]:
    def call(mesh: trimesh.Trimesh, resolution: int) -> np.ndarray:
        from meshlib import mrmeshnumpy, mrmeshpy

        surface = mrmeshnumpy.meshFromFacesVerts(mesh.faces.astype(np.int32), np.asarray(mesh.vertices, np.float32))
        params = mrmeshpy.MeshToDistanceVolumeParams()
        params.vol.origin = mrmeshpy.Vector3f(-0.5, -0.5, -0.5)
        params.vol.voxelSize = mrmeshpy.Vector3f(*(1 / resolution,) * 3)
        params.vol.dimensions = mrmeshpy.Vector3i(*(resolution,) * 3)
        params.dist.maxDistSq = (BAND / resolution) ** 2
        params.dist.nullOutsideMinMax = False
        params.dist.signMode = getattr(mrmeshpy.SignDetectionMode, sign)
        volume = mrmeshpy.meshToDistanceVolume(mrmeshpy.MeshPart(surface), params)
        return resolution * np.array(mrmeshnumpy.getNumpy3Darray(volume))

    return call


def _read_by_open3d(path: Path) -> trimesh.Trimesh:
    import open3d as o3d

    mesh = o3d.io.read_triangle_mesh(str(path))
    return trimesh.Trimesh(np.asarray(mesh.vertices), np.asarray(mesh.triangles), process=False)


def _read_by_pyvista(path: Path) -> trimesh.Trimesh:
    import pyvista

    mesh = pyvista.read(path).triangulate()
    return trimesh.Trimesh(np.asarray(mesh.points, float), mesh.faces.reshape(-1, 4)[:, 1:], process=False)


def _read_by_pcu(path: Path) -> trimesh.Trimesh:
    import point_cloud_utils as pcu

    vertices, faces = pcu.load_mesh_vf(str(path))
    return trimesh.Trimesh(vertices, faces, process=False)


STAGES = [
    ("shapediff", "shapediff", load_mesh, lambda mesh, r: voxelize(mesh, resolution=r, normalize=False)),
    ("open3d, 1 ray", "open3d", _read_by_open3d, _open3d_occupancy(1)),
    ("pyvista", "pyvista", _read_by_pyvista, _pyvista_mask),
    ("point-cloud-utils winding number", "point_cloud_utils", _read_by_pcu, _pcu_winding),
    ("trimesh", "trimesh", lambda path: trimesh.load_mesh(path), _trimesh_fill),
]
OCCUPANCY = [
    Method("open3d, 1 ray", "open3d", _open3d_occupancy(1)),
    Method("open3d, 3 rays", "open3d", _open3d_occupancy(3)),
    Method("pyvista voxelize_binary_mask", "pyvista", _pyvista_mask),
    Method("point-cloud-utils surface and flood fill", "point_cloud_utils", _pcu_fill),
    Method("point-cloud-utils winding number", "point_cloud_utils", _pcu_winding),
    Method("libigl winding number", "igl", lambda mesh, r: _inside_by_winding(mesh, r)),
    Method("trimesh voxelized().fill()", "trimesh", _trimesh_fill),
]
DISTANCE = [
    Method("open3d compute_signed_distance", "open3d", _open3d_distance),
    Method("meshlib, winding number", "meshlib", _meshlib_distance("HoleWindingRule")),
    Method("meshlib, nearest face's normal", "meshlib", _meshlib_distance("ProjectionNormal")),
    Method("meshlib, unsigned", "meshlib", _meshlib_distance("Unsigned")),
]

if __name__ == "__main__":
    main()
