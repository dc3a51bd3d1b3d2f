"""From voxels to files of meshes, part by part: a fresh process, larger grids, thin legs, simplification.

    python benchmarks/meshes.py [--out FILE.md]

Times are processor seconds of one thread, the least of three but for the fresh process. Simplifiers that are not installed are
left out: pip install fast-simplification pyfqmr.
"""

from __future__ import annotations

import argparse
import logging
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import manifold3d
import numpy as np
import trimesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from shapediff.data.shapes import make_shape
from shapediff.geometry.blocks import block_surface
from shapediff.geometry.export import write_mesh
from shapediff.geometry.isosurface import voxels_to_mesh
from shapediff.geometry.printable import MeshOptions, clean_signal, printable_mesh
from shapediff.geometry.report import check_surface
from shapediff.geometry.simplify import merge_flat, simplify_surface
from shapediff.geometry.smoothing import neighbour_mean, smooth_surface, taubin
from shapediff.geometry.voxelize import voxelize
from tests.geometry.random_fields import KINDS, random_field
from tests.geometry.test_printable import leg_volume, table

Surface = tuple[np.ndarray, np.ndarray]

COLD = """
import time; start = time.process_time()
import numpy as np, torch
from shapediff.shapes import Shapes
print(time.process_time() - start)
voxels = torch.from_numpy(np.load({grids!r}))
for i in range(len(voxels)):
    start = time.process_time()
    Shapes(voxels[i : i + 1], (str(i),), (None,), (0,), dict()).save({out!r})
    print(time.process_time() - start)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    logging.disable()
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    say(f"`python {' '.join(sys.argv)}`, {platform.machine()}, one thread, processor seconds.\n")
    for part in (_cold, _parts, _legs, _simplifiers):
        part(say)
        say("")
    if args.out:
        args.out.write_text("\n".join(lines), encoding="utf-8")


def _signal(name: str, resolution: int) -> np.ndarray:
    shape = make_shape(name, seed=1)
    return np.where(voxelize(shape.mesh, resolution=resolution), np.float32(1), np.float32(-1))


def _seconds(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def _cold(say: Callable[[str], None]) -> None:
    """Eight shapes of 32^3 to .obj and a manifest, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        grids = Path(folder) / "grids.npy"
        np.save(grids, np.stack([_signal(name, 32) for name in ("chair", "stool", "lamp", "table") * 2]))
        code = COLD.format(grids=str(grids), out=folder)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imports, first, *others = map(float, done.stdout.split())
    say("| fresh process, 8 shapes of 32^3 to .obj | s |\n|---|---|")
    say(
        f"| import, with torch | {imports:.2f} |\n| first shape, with trimesh, scipy, scikit-image, numba | {first:.2f} |"
    )
    say(
        f"| each other shape | {np.mean(others):.3f} |\n| all after the import, a shape | {(first + sum(others)) / 8:.2f} |"
    )


def _parts(say: Callable[[str], None]) -> None:
    say("| a car | 32^3 | 64^3 | 128^3 |\n|---|---|---|---|")
    rows: dict[str, list[str]] = {}
    for resolution in (32, 64, 128):
        signal = _signal("car", resolution)
        mesh = voxels_to_mesh(signal, smooth=0)
        vertices, faces = (np.asarray(mesh.vertices) + 0.5) * resolution, np.asarray(mesh.faces)
        blocks = block_surface(signal > 0)
        with tempfile.TemporaryDirectory() as folder:
            write = {
                f"write .{suffix}": partial(write_mesh, mesh, f"{folder}/a.{suffix}")
                for suffix in ("obj", "stl", "ply", "glb", "3mf")
            }
            parts = {
                "clean": partial(clean_signal, signal, MeshOptions()),
                "marching cubes": partial(voxels_to_mesh, signal, smooth=0),
                "smooth": partial(smooth_surface, vertices, faces, iterations=12),
                "report": partial(check_surface, vertices, faces),
                "blocks": partial(block_surface, signal > 0),
                "merge flat blocks": partial(merge_flat, *blocks),
                "simplify to a fifth": partial(simplify_surface, vertices, faces, max_faces=len(faces) // 5),
                **write,
            }
            for name, run in parts.items():
                rows.setdefault(name, []).append(f"{_seconds(run):.3f}")
        rows.setdefault("faces", []).append(str(len(faces)))
    for name, cells in rows.items():
        say(f"| {name} | {' | '.join(cells)} |")


def _legs(say: Callable[[str], None]) -> None:
    """The cross-section of a leg after smoothing, as a share of that before."""
    say("| 12 iterations leave of a leg's cross-section | 1 voxel | slanted | 2 voxels |\n|---|---|---|---|")
    for name in ("Taubin alone", "as shapediff has it"):
        cells = []
        for slant, width in ((0, 1), (0.5, 1), (0, 2)):
            mesh = voxels_to_mesh(table(slant, width), smooth=0)
            vertices, faces = (np.asarray(mesh.vertices) + 0.5) * 32, np.asarray(mesh.faces)
            if name.startswith("Taubin"):
                smooth = taubin(vertices, neighbour_mean(faces, len(vertices)), iterations=12)
            else:
                smooth = smooth_surface(vertices, faces, iterations=12)
            after = trimesh.Trimesh(smooth / 32 - 0.5, faces, process=False)
            cells.append(f"{100 * leg_volume(after) / leg_volume(mesh):.0f} %")
        say(f"| {name} | {' | '.join(cells)} |")


def _simplifiers(say: Callable[[str], None]) -> None:
    """Half and a tenth of the faces of shapes of 64^3 and of random fields of 14^3."""
    shapes = [printable_mesh(_signal(name, 64)) for name in ("chair", "lamp", "car", "bed")]
    fields = [
        printable_mesh(random_field(kind, seed, resolution=14), MeshOptions(min_part=0))
        for kind in KINDS
        for seed in range(4)
    ]
    say(
        "| simplifier | shapes: closed, manifold | crossing | s a mesh | fields: closed, manifold | crossing | s a mesh |"
    )
    say("|---|---|---|---|---|---|---|")
    for name, simplify in SIMPLIFIERS.items():
        try:
            cells = [cell for meshes in (shapes, fields) for cell in _judged(simplify, meshes)]
        except ImportError:
            continue
        say(f"| {name} | {' | '.join(cells)} |")


def _judged(simplify: Callable[[Surface, int], Surface], meshes: list[trimesh.Trimesh]) -> tuple[str, str, str]:
    reports, seconds = [], 0.0
    for mesh in meshes:
        scale = 64.0  # as voxels: some of these have absolute tolerances
        surface = np.asarray(mesh.vertices) * scale, np.asarray(mesh.faces, np.int64)
        for share in (2, 10):
            start = time.process_time()
            vertices, faces = simplify(surface, len(mesh.faces) // share)
            seconds += time.process_time() - start
            reports.append(
                check_surface(np.array(vertices, np.float64), np.array(faces, np.int64)) if len(faces) else None
            )
    num = len(reports)
    sound = sum(r is not None and r.manifold and not r.degenerate for r in reports)
    crossing = sum(r is None or r.crossing > 0 for r in reports)
    return f"{100 * sound / num:.0f} %", f"{100 * crossing / num:.0f} %", f"{seconds / num:.2f}"


def _libigl(surface: Surface, num: int, *, blocks: bool) -> Surface:
    import igl

    vertices, faces = surface
    fewer, of, *_ = igl.qslim(np.asfortranarray(vertices), np.asfortranarray(faces, np.int32), num, blocks)
    return fewer, of


def _open3d(surface: Surface, num: int) -> Surface:
    import open3d as o3d

    vertices, faces = (np.array(part) for part in surface)
    mesh = o3d.geometry.TriangleMesh(o3d.utility.Vector3dVector(vertices), o3d.utility.Vector3iVector(faces))
    fewer = mesh.simplify_quadric_decimation(num)
    return np.asarray(fewer.vertices), np.asarray(fewer.triangles)


def _manifold(surface: Surface, num: int) -> Surface:
    """It takes a tolerance: ten halvings between 1e-4 and 4 voxels."""
    vertices, faces = surface
    body = manifold3d.Manifold(manifold3d.Mesh64(np.array(vertices), np.array(faces, np.uint64)))
    low, high, best = 1e-4, 4.0, body
    for _ in range(10):
        middle = (low * high) ** 0.5
        fewer = body.simplify(middle)
        low, high = (low, middle) if fewer.num_tri() <= num else (middle, high)
        best = fewer if fewer.num_tri() <= num else best
    mesh = best.to_mesh64()
    return mesh.vert_properties[:, :3], mesh.tri_verts


def _fast_simplification(surface: Surface, num: int) -> Surface:
    import fast_simplification

    return fast_simplification.simplify(surface[0].astype(np.float32), surface[1].astype(np.int32), target_count=num)


def _pyfqmr(surface: Surface, num: int) -> Surface:
    import pyfqmr

    simplifier = pyfqmr.Simplify()
    simplifier.setMesh(*surface)
    simplifier.simplify_mesh(num, aggressiveness=5, preserve_border=True, verbose=False)
    return simplifier.getMesh()[:2]


SIMPLIFIERS: dict[str, Callable[[Surface, int], Surface]] = {
    "libigl qslim, intersections blocked (in use)": partial(_libigl, blocks=True),
    "libigl qslim": partial(_libigl, blocks=False),
    "open3d quadric decimation": _open3d,
    "manifold3d simplify": _manifold,
    "fast-simplification": _fast_simplification,
    "pyfqmr": _pyfqmr,
}


if __name__ == "__main__":
    main()
