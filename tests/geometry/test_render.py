"""Pictures: silhouettes have the size and place that the camera says, light and shadow fall where geometry says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from shapediff.errors import MeshError
from shapediff.geometry.camera import MARGIN, Camera
from shapediff.geometry.raycast import KEY_AZIMUTH, KEY_ELEVATION, Studio
from shapediff.geometry.render import (
    BACKGROUND,
    blank,
    contact_sheet,
    render_mesh,
    render_voxels,
    save_gif,
    save_png,
    turntable,
)
from tests.geometry.test_isosurface import ball

SKY = np.round(BACKGROUND * 255)


def silhouette(picture: np.ndarray) -> np.ndarray:
    return np.abs(picture.astype(float) - SKY).max(-1) > 40


def box(*extents: float, at: tuple[float, float, float] = (0, 0, 0)) -> trimesh.Trimesh:
    made = trimesh.creation.box(extents)
    made.apply_translation(at)
    return made


def test_ball_is_a_disc_of_the_right_area() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=4)
    # From below no ground is seen. A pixel of the rim is about 1 % of the area each way.
    disc = silhouette(render_mesh(mesh, size=128, elevation=-20))
    assert disc.mean() == pytest.approx(np.pi / 4 / MARGIN**2, rel=0.03)
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
    mesh = trimesh.util.concatenate(
        [box(0.75, 0.125, 0.3, at=(0, -0.3125, 0)), box(0.125, 0.75, 0.3, at=(-0.3125, 0, 0))]
    )
    if signal[28 - 2, 20, 15] > 0:
        mesh.apply_scale((-1, 1, 1))
    return render_mesh(mesh, size=96, **view)  # type: ignore[arg-type]


def test_an_inside_out_mesh_looks_the_same() -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3)
    plain = render_mesh(mesh, size=64)
    mesh.invert()
    assert np.abs(render_mesh(mesh, size=64).astype(int) - plain).mean() < 0.1


def test_an_empty_grid_is_an_empty_picture() -> None:
    assert not silhouette(render_voxels(np.full((8, 8, 8), -1.0), size=32)).any()


def test_the_ground_is_dark_where_the_key_light_does_not_reach() -> None:
    """A pole stands in the middle; the light is at the left, so its shadow lies at the right, as long as its height says."""
    height = 1.0
    pole = box(0.15, height, 0.15)
    studio = Studio(pole)
    camera = Camera.framing(np.array([[-1.5, -0.5, -1.5], [1.5, 0.5, 1.5]]), 0, 60)
    picture = studio.picture(camera, size=256).astype(float).mean(-1)
    a, e = np.radians([KEY_AZIMUTH, KEY_ELEVATION])
    away = -np.array([np.sin(a), 0, np.cos(a)])
    shadow_length = height / np.tan(e)

    def at(place: np.ndarray) -> float:
        offset = place - camera.eye
        tangents = np.array([offset @ camera.right, offset @ camera.up]) / -(offset @ camera.back)
        x, y = (tangents - camera.centre) / camera.half
        return picture[int((1 - y) * 128), int((x + 1) * 128)]

    foot = np.array([0, -height / 2, 0])
    lit = picture.max()
    assert at(foot + 0.4 * shadow_length * away) < lit - 15
    assert at(foot + 1.3 * shadow_length * away) > lit - 6
    assert at(foot - 0.4 * shadow_length * away) > lit - 6


def test_an_open_floor_is_bright_and_one_under_a_roof_is_dark() -> None:
    floor, roof = box(1, 0.05, 1), box(1, 0.05, 1, at=(0, 0.2, 0))
    open_floor = render_mesh(floor, size=96, azimuth=0, elevation=40)
    covered = render_mesh(trimesh.util.concatenate([floor, roof]), size=96, azimuth=0, elevation=0)
    top = open_floor[48, 48].astype(int).sum()
    gap = covered[40:56, 30:66].astype(int).sum(-1)
    assert gap.min() < 0.6 * top


@pytest.mark.parametrize("size", [8, 33, 64])
def test_every_size_is_drawn_and_always_alike(size: int) -> None:
    mesh = box(1, 0.5, 0.7)
    picture = render_mesh(mesh, size=size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert (render_mesh(mesh, size=size) == picture).all()


def test_a_flat_face_has_one_colour_and_a_crease_two() -> None:
    """Shading is smooth within a face of a box, and does not leak over its edges."""
    picture = render_mesh(box(1, 1, 1), size=128, azimuth=45, elevation=0).astype(int)
    left, right = picture[40:88, 30:58], picture[40:88, 70:98]
    assert np.ptp(left.reshape(-1, 3), axis=0).max() < 12  # the sheen varies with the angle of view
    assert abs(left.mean() - right.mean()) > 20


def test_nothing_thin_is_lost() -> None:
    """Tiles that no ray visits hold nothing: a needle across the picture has no gap."""
    needle = trimesh.creation.cylinder(0.012, segment=[[-0.5, -0.4, 0], [0.5, 0.4, 0]], sections=12)
    picture = render_mesh(needle, size=128, azimuth=0, elevation=0)
    columns = np.flatnonzero((np.abs(picture.astype(float) - SKY).max(-1) > 20).any(0))
    assert len(columns) == np.ptp(columns) + 1 == pytest.approx(128 / MARGIN, abs=3)


def test_hostile_meshes_and_sizes_are_refused() -> None:
    with pytest.raises(MeshError, match="finite"):
        render_mesh(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]], [[0, 1, 2]], process=False))
    with pytest.raises(MeshError, match="faces"):
        render_mesh(trimesh.Trimesh(np.zeros((3, 3)), np.zeros((0, 3), int), process=False))
    with pytest.raises(ValueError, match="size=100000"):
        render_mesh(box(1, 1, 1), size=100000)
    speck = trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]], process=False)
    assert render_mesh(speck, size=16).shape == (16, 16, 3)


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


def test_a_new_class_starts_a_new_row_under_its_name() -> None:
    pictures = [np.full((40, 40, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    sheet = contact_sheet(pictures, columns=2, rows=["a", "a", "a", "b" * 100])
    assert sheet.shape == (2 * 18 + 3 * 40, 80, 3)
    assert [int(sheet[y, 20, 0]) for y in (18 + 20, 58 + 20, 116 + 20)] == [10, 30, 40]
    assert (sheet[58 + 20, 60] == blank(1)[0, 0]).all()
    assert (sheet[:18] < 200).any() and (sheet[98:116] < 200).any()


def test_a_turntable_turns_once_and_shares_one_palette(tmp_path: Path) -> None:
    meshes = [box(1, 0.5, 0.25), trimesh.creation.icosphere(subdivisions=2)]
    turntable(meshes, tmp_path / "t.gif", size=48, num_frames=8, colours=[(0.9, 0.3, 0.3), (0.3, 0.3, 0.9)])
    gif = Image.open(tmp_path / "t.gif")
    assert (gif.n_frames, gif.size, gif.info["loop"]) == (8, (96, 48), 0)
    frames = []
    for i in range(8):
        gif.seek(i)
        frames.append(np.asarray(gif.convert("RGB")).astype(int))
    # The box comes around after half a turn, as its shape repeats, and looks different after a quarter.
    assert np.abs(frames[4] - frames[0])[:, :48].mean() < 4 < np.abs(frames[2] - frames[0])[:, :48].mean()
    # The light stands still, so a ball looks the same from everywhere, in the same colours.
    assert max(np.abs(frame - frames[0])[:, 48:].mean() for frame in frames) < 4
    assert len(np.unique(np.concatenate(frames).reshape(-1, 3), axis=0)) <= 256
    with pytest.raises(ValueError, match="at least one"):
        save_gif([], tmp_path / "none.gif", seconds=1)
    assert [p.name for p in tmp_path.iterdir()] == ["t.gif"]
