"""A picture of a mesh without a display or a GPU: our ray caster beside pyvista off-screen and open3d's own renderer.

    python benchmarks/render.py [--size 512] [--repeats 5] [--out FILE.md] [MESH ...]

Times are of the process (its CPU time), on one core: what it computes, whatever else the machine does. `view` is one more
picture of a mesh that is set up already, `mesh` a picture with the setting up. The others draw without shadows or a sky, but
pyvista also with shadows and screen-space occlusion, which is the nearest to our picture. Each side draws in a process of its
own, since two graphics libraries in one do not always agree. Needs: pip install pyvista. trimesh draws only in a window.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SIDES = ("shapediff", "pyvista, plain", "pyvista, shadows and occlusion", "open3d OffscreenRenderer", "trimesh")
LIMIT_SECONDS = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "meshes", nargs="*", type=Path, metavar="MESH", help="default: a smooth one of 20,480 faces, a chair"
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_measure(args.side, args.meshes[0], args.size, args.repeats)))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = _compare(args.meshes or _own_meshes(Path(folder)), args.size, args.repeats)
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _compare(meshes: list[Path], size: int, repeats: int) -> list[str]:
    lines = [f"`python {' '.join(sys.argv)}`\n", f"{size} x {size} pixels, one core, milliseconds of process time.\n"]
    lines += ["| mesh | side | mesh | view | view, times ours |", "|---|---|---|---|---|"]
    for mesh in meshes:
        ours = 0.0
        for side in SIDES:
            command = [
                sys.executable,
                __file__,
                str(mesh),
                "--side",
                side,
                "--size",
                str(size),
                "--repeats",
                str(repeats),
            ]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=LIMIT_SECONDS,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
                reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1][:80]
            except subprocess.TimeoutExpired:
                found, reason = None, f"no picture within {LIMIT_SECONDS} s"
            if found is None:
                lines.append(f"| {mesh.stem} | {side} | cannot: {reason} | | |")
                continue
            ours = ours or found["view"]
            times = f"{found['mesh']:.0f} | {found['view']:.0f} | {found['view'] / ours:.2f}"
            lines.append(f"| {mesh.stem}, {found['faces']} faces | {side} | {times} |")
    return lines


def _own_meshes(folder: Path) -> list[Path]:
    import trimesh

    smooth = trimesh.creation.icosphere(subdivisions=5)
    smooth.vertices *= 1 + 0.15 * np.sin(9 * smooth.vertices).prod(1, keepdims=True)
    parts = [trimesh.creation.box((0.5, 0.06, 0.5)), trimesh.creation.box((0.5, 0.6, 0.05))]
    parts[1].apply_translation((0, 0.3, -0.22))
    for x, z in ((-0.2, -0.2), (-0.2, 0.2), (0.2, -0.2), (0.2, 0.2)):
        parts.append(trimesh.creation.cylinder(0.03, segment=[[x, -0.5, z], [x, 0, z]], sections=24))
    smooth.export(folder / "blob.ply")
    trimesh.util.concatenate(parts).export(folder / "chair.ply")
    return [folder / "blob.ply", folder / "chair.ply"]


def _measure(side: str, path: Path, size: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the quickest of `repeats`, after one that is not counted."""
    import trimesh

    mesh = trimesh.load_mesh(path)
    if mesh.faces is None:
        raise SystemExit(f"{path} holds no faces")

    def quickest(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return 1e3 * min(times)

    open_scene = {
        "shapediff": _shapediff,
        "pyvista, plain": _pyvista,
        "pyvista, shadows and occlusion": lambda mesh, size: _pyvista(mesh, size, is_rich=True),
        "open3d OffscreenRenderer": _open3d,
        "trimesh": _trimesh,
    }[side]
    draw = open_scene(mesh, size)
    picture = np.asarray(draw())
    assert picture.shape[:2] == (size, size), picture.shape
    assert np.ptp(picture[..., :3]) > 60, "the picture is blank"
    view = quickest(draw)
    del draw
    return {"faces": len(mesh.faces), "view": view, "mesh": quickest(lambda: open_scene(mesh, size)())}


def _shapediff(mesh: object, size: int) -> Callable[[], np.ndarray]:
    from shapediff.geometry.camera import Camera
    from shapediff.geometry.raycast import Studio

    studio = Studio(mesh)  # type: ignore[arg-type]
    return lambda: studio.picture(Camera.framing(studio.vertices, 35, 22), size=size)


def _pyvista(mesh: object, size: int, *, is_rich: bool = False) -> Callable[[], np.ndarray]:
    import pyvista

    plotter = pyvista.Plotter(off_screen=True, window_size=[size, size])
    wrapped = pyvista.wrap(mesh)
    plotter.add_mesh(wrapped, color="#6fa3d8", smooth_shading=True, split_sharp_edges=True)
    if is_rich:
        low = wrapped.bounds
        plotter.add_mesh(pyvista.Plane((0, low[2], 0), (0, 1, 0), 6, 6), color="white")
        plotter.enable_shadows()
        plotter.enable_ssao(radius=0.3, kernel_size=64)
    plotter.enable_anti_aliasing("fxaa")
    plotter.camera_position = [(1.7, 1.1, 2.4), (0, 0, 0), (0, 1, 0)]
    plotter.show(auto_close=False)

    def draw() -> np.ndarray:
        plotter.camera.azimuth += 0.5  # or a picture that is there would be handed out again
        plotter.render()
        return plotter.screenshot(return_img=True)

    return draw


def _open3d(mesh: object, size: int) -> Callable[[], np.ndarray]:
    import open3d as o3d

    shape = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector(mesh.vertices),  # type: ignore[attr-defined]
        o3d.utility.Vector3iVector(mesh.faces),  # type: ignore[attr-defined]
    )
    shape.compute_vertex_normals()
    renderer = o3d.visualization.rendering.OffscreenRenderer(size, size)
    material = o3d.visualization.rendering.MaterialRecord()
    material.shader = "defaultLit"
    renderer.scene.add_geometry("shape", shape, material)
    renderer.setup_camera(40.0, [0, 0, 0], [1.7, 1.1, 2.4], [0, 1, 0])
    return lambda: np.asarray(renderer.render_to_image())


def _trimesh(mesh: object, size: int) -> Callable[[], np.ndarray]:
    import io

    from PIL import Image

    scene = mesh.scene()  # type: ignore[attr-defined]
    return lambda: np.asarray(Image.open(io.BytesIO(scene.save_image(resolution=(size, size), visible=False))))


if __name__ == "__main__":
    main()
