"""Pictures: silhouettes have the size and place that the camera says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapediff.geometry.render import BACKGROUND, contact_sheet, render_mesh, render_voxels, save_png
from tests.geometry.test_isosurface import ball

SKY = np.round(BACKGROUND * 255)


def silhouette(picture: np.ndarray) -> np.ndarray:
    return np.abs(picture.astype(float) - SKY).max(-1) > 40


def test_ball_is_a_disc_of_the_right_area() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=4)
    disc = silhouette(render_mesh(mesh, size=128))
    # Framed at 1.04 radii; a pixel of the rim is about 1 % of the area each way.
    assert disc.mean() == pytest.approx(np.pi / 4 / 1.04**2, rel=0.03)
    disc = silhouette(render_voxels(ball(32, 0.4), size=128))
    assert disc.mean() == pytest.approx(np.pi * 0.4**2 / 1.6**2, rel=0.05)


@pytest.mark.parametrize("kind", ["mesh", "voxels"])
def test_right_is_right_up_is_up_and_the_front_is_in_front(kind: str) -> None:
    """An L: a foot towards +x and a post upwards; a block at the back is hidden from the front."""
    signal = np.full((32, 32, 32), -1.0, np.float32)
    signal[4:28, 4:8, 10:20] = 1
    signal[4:8, 4:28, 10:20] = 1
    picture = draw(kind, signal, azimuth=0, elevation=0)
    found = np.argwhere(silhouette(picture))
    (top, left), (bottom, right) = found.min(0), found.max(0)
    half_row, half_column = (top + bottom) // 2, (left + right) // 2
    assert silhouette(picture)[half_row, : half_column - 3].any()
    assert not silhouette(picture)[top : half_row - 3, half_column:].any()
    assert silhouette(picture)[bottom - 2, right - 3]
    mirrored = silhouette(draw(kind, signal[::-1].copy(), azimuth=0, elevation=0))
    assert (mirrored[:, ::-1] == silhouette(picture)).mean() > 0.995


def draw(kind: str, signal: np.ndarray, **view: float) -> np.ndarray:
    if kind == "voxels":
        return render_voxels(signal, size=96, **view)  # type: ignore[arg-type]
    box = trimesh.creation.box
    foot, post = box((0.75, 0.125, 0.3)), box((0.125, 0.75, 0.3))
    foot.apply_translation((0, -0.3125, 0))
    post.apply_translation((-0.3125, 0, 0))
    mesh = trimesh.util.concatenate([foot, post])
    if signal[28 - 2, 20, 15] > 0:
        mesh.apply_scale((-1, 1, 1))
    return render_mesh(mesh, size=96, **view)  # type: ignore[arg-type]


def test_an_inside_out_mesh_looks_the_same() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3)
    plain = render_mesh(mesh, size=64)
    mesh.invert()
    assert np.abs(render_mesh(mesh, size=64).astype(int) - plain).mean() < 2


def test_an_empty_grid_is_an_empty_picture() -> None:
    assert not silhouette(render_voxels(np.full((8, 8, 8), -1.0), size=32)).any()


def test_sheet_and_file(tmp_path: Path) -> None:
    pictures = [np.full((40, 40, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)]
    sheet = contact_sheet(pictures, columns=3, captions=list("abcde"))
    assert sheet.shape == (2 * (40 + 18), 120, 3)
    assert sheet[20, 100].tolist() == [30, 30, 30]
    assert sheet[58 + 20, 60].tolist() == [50, 50, 50]
    assert contact_sheet(pictures[:1], columns=3).shape == (40, 40, 3)
    save_png(sheet, tmp_path / "deep" / "sheet.png")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], columns=3)
