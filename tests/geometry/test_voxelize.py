"""Solids of meshes: exact where the mesh is exact, the union of their pieces, and solid whatever is wrong with the mesh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trimesh
from scipy.ndimage import label

from shapediff.errors import MeshError
from shapediff.geometry.isosurface import voxels_to_mesh
from shapediff.geometry.kernels.flood import fill_enclosed
from shapediff.geometry.mesh import load_mesh, normalize_mesh
from shapediff.geometry.voxelize import voxelize
from tests.geometry.test_isosurface import centres

R = 32


def box(low: tuple[float, ...], high: tuple[float, ...]) -> trimesh.Trimesh:
    low_, high_ = np.array(low), np.array(high)
    mesh = trimesh.creation.box(high_ - low_)
    mesh.apply_translation((low_ + high_) / 2)
    return mesh


def inside_box(low: tuple[float, ...], high: tuple[float, ...], resolution: int = R) -> np.ndarray:
    points = centres(resolution)
    return ((points > np.array(low)) & (points < np.array(high))).all(-1)


def vox(mesh: trimesh.Trimesh, **options: object) -> np.ndarray:
    return voxelize(mesh, **{"resolution": R, "normalize": False, **options})  # type: ignore[arg-type]


def joined(*meshes: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.util.concatenate(list(meshes))


LOW, HIGH = (-0.31, -0.22, -0.4), (0.27, 0.33, 0.11)


def test_box_is_exact() -> None:
    assert np.array_equal(vox(box(LOW, HIGH)), inside_box(LOW, HIGH))


def test_union_of_overlapping_nested_and_inverted_pieces() -> None:
    other_low, other_high = (-0.1, -0.1, -0.1), (0.45, 0.2, 0.45)
    first, second = box(LOW, HIGH), box(other_low, other_high)
    union = inside_box(LOW, HIGH) | inside_box(other_low, other_high)
    assert np.array_equal(vox(joined(first, second)), union)
    second.invert()
    assert np.array_equal(vox(joined(first, second)), union)
    core = box((-0.1, -0.1, -0.2), (0.1, 0.1, 0.0))
    core.invert()  # a cavity as modellers write it
    assert np.array_equal(vox(joined(first, core)), inside_box(LOW, HIGH))


@pytest.mark.parametrize(
    "harm", ["inverted", "some inverted", "twice", "two-sided", "open", "open at two ends", "loose faces"]
)
def test_a_harmed_box_is_still_the_box(harm: str) -> None:
    mesh = box(LOW, HIGH)
    if harm == "inverted":
        mesh.invert()
    elif harm == "some inverted":
        mesh.faces[:3] = mesh.faces[:3, ::-1]
    elif harm == "twice":
        mesh = joined(mesh, mesh)
    elif harm == "two-sided":
        mesh = trimesh.Trimesh(mesh.vertices, np.concatenate([mesh.faces, mesh.faces[:, ::-1]]), process=False)
    elif harm == "open at two ends":
        mesh.update_faces(np.abs(mesh.face_normals[:, 0]) < 0.5)
    elif harm == "open":
        mesh.update_faces(mesh.face_normals[:, 1] < 0.5)
    else:
        mesh = trimesh.Trimesh(mesh.vertices[mesh.faces].reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    found, exact = vox(mesh), inside_box(LOW, HIGH)
    assert np.array_equal(found, exact)


def scattered(mesh: trimesh.Trimesh, harm: str) -> trimesh.Trimesh:
    rng = np.random.default_rng(0)
    corners = mesh.triangles.copy()
    if harm == "a tenth of the faces missing":
        return trimesh.Trimesh(mesh.vertices, mesh.faces[rng.random(len(mesh.faces)) > 0.1], process=False)
    if harm == "cracked":
        corners += rng.normal(0, 1e-3, corners.shape)
    else:
        corners = 0.9 * corners + 0.1 * corners.mean(1, keepdims=True)
    return trimesh.Trimesh(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3), process=False)


@pytest.mark.parametrize("harm", ["a tenth of the faces missing", "cracked", "a gap around every face"])
def test_a_ball_with_holes_all_over_is_the_ball(harm: str) -> None:
    """Gaps of up to two voxels between 5,120 faces: a third of the lines through it meet one, and no shell is left of it."""
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.4)
    found, exact = vox(scattered(ball, harm), resolution=64), vox(ball, resolution=64)
    assert iou(found, exact) > 0.98
    assert not found[np.linalg.norm(centres(64), axis=-1) > 0.4 + 1 / 64].any()


@pytest.mark.parametrize("wall", [[[0, 7, 1], [0, 6, 7]], [[0, 7, 2], [0, 5, 7]]])
def test_an_interior_wall_takes_nothing_away(wall: list[list[int]]) -> None:
    """A diagonal wall that shares its edges with a box makes one piece with edges of three faces; lines cross it oddly.

    What may be lost are slivers between the wall and two sides that meet at its ends: some of the voxels along two edges.
    """
    mesh = box(LOW, HIGH)
    walled = trimesh.Trimesh(mesh.vertices, np.concatenate([mesh.faces, wall]), process=False)
    found, exact = vox(walled), inside_box(LOW, HIGH)
    assert not (found & ~exact).any() and (exact & ~found).sum() <= 20


def test_what_surfaces_seal_off_is_exact_up_to_their_faces() -> None:
    """The flood alone, given the voxels along the sides of a box on their inner side and where the sides part two centres."""
    crossed, surface, solid = np.zeros((R, R, R), np.uint8), np.zeros((R, R, R), bool), np.zeros((R, R, R), bool)
    inside = inside_box(LOW, HIGH)
    for axis in range(3):
        change = np.diff(inside.astype(np.int8), axis=axis) != 0
        before = tuple(slice(0, -1) if k == axis else slice(None) for k in range(3))
        after = tuple(slice(1, None) if k == axis else slice(None) for k in range(3))
        crossed[before] |= (change << axis).astype(np.uint8)
        surface[before] |= change & inside[before]
        surface[after] |= change & inside[after]
    fill_enclosed(solid, surface, crossed)
    assert np.array_equal(solid, inside)
    # Where nothing parts them, as many centres outside as inside are near: what is on the surface stays out.
    solid[:] = False
    fill_enclosed(solid, surface, np.zeros_like(crossed))
    assert not (solid & ~inside).any() and (inside & ~surface <= solid).all()


def cup() -> trimesh.Trimesh:
    outer = trimesh.creation.cylinder(radius=0.4, height=0.8, sections=64)
    inner = trimesh.creation.cylinder(radius=0.3, height=0.8, sections=64)
    inner.apply_translation((0, 0, 0.1))
    return trimesh.boolean.difference([outer, inner], engine="manifold")


@pytest.mark.parametrize("harm", ["none", "inverted", "no underside", "loose faces"])
def test_a_cup_keeps_its_cavity(harm: str) -> None:
    mesh = cup()
    volume = mesh.volume
    if harm == "inverted":
        mesh.invert()
    elif harm == "no underside":
        mesh.update_faces(mesh.triangles_center[:, 2] > -0.399)
    elif harm == "loose faces":
        corners = mesh.vertices[mesh.faces].reshape(-1, 3)
        mesh = trimesh.Trimesh(corners, np.arange(len(corners)).reshape(-1, 3), process=False)
    found = vox(mesh)
    assert not found[R // 2, R // 2, R // 2]
    assert found[R // 2, R // 2, int((0.5 - 0.35) * R)]
    # Walls of 3.2 voxels, each of two surfaces off by a part of half a voxel.
    assert found.sum() / R**3 == pytest.approx(volume, rel=0.1)


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_ball_has_its_volume(resolution: int) -> None:
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    found = vox(mesh, resolution=resolution)
    # A lattice count of a ball is off by far less than one layer of its surface, 3 / (0.4 R); a tenth of that.
    assert found.mean() == pytest.approx(mesh.volume, rel=0.3 / (0.4 * resolution))
    assert (found ^ (np.linalg.norm(centres(resolution), axis=-1) < 0.4)).sum() <= 0.01 * found.sum()


def knot() -> trimesh.Trimesh:
    """A shape without symmetry and without faces on planes of voxel centres."""
    mesh = trimesh.creation.torus(0.27, 0.11, major_sections=20, minor_sections=10)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(0.7, (1, 2, 3)))
    return joined(mesh, box((0.013, 0.021, -0.4), (0.17, 0.44, 0.31)))


def test_turns_and_whole_voxels_commute() -> None:
    mesh = knot()
    plain = vox(mesh)
    turned = mesh.copy()
    turned.vertices = mesh.vertices @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]])  # (x, y) -> (-y, x)
    assert (vox(turned) ^ np.rot90(plain, 1, (0, 1))).sum() <= 2  # the tie-break turns the other way
    moved = mesh.copy()
    moved.vertices = mesh.vertices + np.array([1, -2, 1]) / R
    assert np.array_equal(vox(moved)[1:, :-2, 1:], plain[:-1, 2:, :-1])


def winding_number(mesh: trimesh.Trimesh, points: np.ndarray) -> np.ndarray:
    """The generalised winding number (Jacobson et al. 2013): solid angles of all triangles over 4 pi, the slow reference."""
    total = np.zeros(len(points))
    for a, b, c in mesh.vertices[mesh.faces]:
        a, b, c = a - points, b - points, c - points
        la, lb, lc = (np.linalg.norm(v, axis=-1) for v in (a, b, c))
        numerator = np.einsum("ni,ni->n", a, np.cross(b, c))
        denominator = (
            la * lb * lc
            + np.einsum("ni,ni->n", a, b) * lc
            + np.einsum("ni,ni->n", b, c) * la
            + np.einsum("ni,ni->n", c, a) * lb
        )
        total += 2 * np.arctan2(numerator, denominator)
    return total / (4 * np.pi)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_agrees_with_the_winding_number() -> None:
    mesh = knot()
    reference = winding_number(mesh, centres(R).reshape(-1, 3)).reshape(R, R, R) > 0.5
    assert iou(vox(mesh), reference) > 0.999


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.parametrize("name", ["furniture/sofa/armchair", "furniture/lamp/lamp_table", "furniture/book/book_set"])
def test_closed_real_meshes_agree_with_the_winding_number(shared_data: Path, name: str) -> None:
    path = shared_data / "meshes" / (f"{name}.obj")
    mesh, _ = normalize_mesh(load_mesh(path))
    reference = winding_number(mesh, centres(R).reshape(-1, 3)).reshape(R, R, R) > 0.5
    assert iou(vox(mesh, keep_thin=False), reference) > 0.99


def test_thin_parts_stay_and_stay_connected() -> None:
    """A seat on four legs of 0.3 voxels, off the voxel centres."""
    seat = box((-0.4, 0.1, -0.4), (0.4, 0.2, 0.4))
    legs = [box((x, -0.45, z), (x + 0.3 / R, 0.15, z + 0.3 / R)) for x in (-0.37, 0.33) for z in (-0.3701, 0.3304)]
    mesh = joined(seat, *legs)
    with_legs, without = vox(mesh), vox(mesh, keep_thin=False)
    assert np.array_equal(without, inside_box((-0.4, 0.1, -0.4), (0.4, 0.2, 0.4)))
    assert (without & ~with_legs).sum() == 0
    surface = voxels_to_mesh(with_legs, smooth=0)
    assert surface.body_count == 1
    assert surface.bounds[0, 1] == pytest.approx(-0.45, abs=1 / R)
    # A thick shape is left as it is.
    assert np.array_equal(vox(seat), vox(seat, keep_thin=False))


@pytest.mark.parametrize("degrees", [0, 5, 20, 35, 45])
@pytest.mark.parametrize("thickness", [0.2, 0.4, 0.7, 1.2])
def test_a_slanted_panel_is_one_layer_without_gaps(thickness: float, degrees: float) -> None:
    """A chair's back thinner than a voxel: every column that it crosses holds a voxel, and all of them hang together."""
    turn = trimesh.transformations.rotation_matrix(np.radians(degrees), (0.1, 0.05, 1))
    shift = np.array([0.003, 0.0071, 0.002])
    panel = trimesh.creation.box((0.7, thickness / R, 0.7))
    panel.apply_transform(turn)
    panel.apply_translation(shift)
    found = vox(panel)
    across = np.linspace(-0.3, 0.3, 61)
    x, z = (values.ravel() for values in np.meshgrid(across, across))
    middle = np.stack([x, 0 * x, z], 1) @ turn[:3, :3].T + shift
    columns = np.floor((middle + 0.5) * R).astype(int)
    assert found.any(1)[columns[:, 0], columns[:, 2]].all()
    assert label(found)[1] == 1
    # A layer one voxel thick, and one more at each of its steps, whose share is the tangent of the slope.
    slope = np.tan(np.radians(degrees))
    assert found.sum() <= (max(thickness, 1.0) + slope) * (0.7 * R + 1) ** 2 * np.cos(np.radians(degrees)) + R


def test_half_a_ball_is_a_solid_and_a_wavy_sheet_is_none() -> None:
    """Lines cross the waves of a sheet twice too; what they enclose has most of the sheet nowhere near it."""
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.4)
    half = trimesh.Trimesh(ball.vertices, ball.faces[ball.triangles_center[:, 1] < 0], process=False)
    below = (np.linalg.norm(centres(R), axis=-1) < 0.4) & (centres(R)[..., 1] < 0)
    assert iou(vox(half), below) > 0.95  # the rim is a row of triangles, not a plane

    across = np.linspace(-0.4, 0.4, 30)
    x, z = (values.ravel() for values in np.meshgrid(across, across))
    corner = np.arange(900).reshape(30, 30)
    a, b, c, d = corner[:-1, :-1].ravel(), corner[1:, :-1].ravel(), corner[:-1, 1:].ravel(), corner[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([d, c, b], 1)])
    waves = trimesh.Trimesh(np.stack([x, 0.15 * np.sin(9 * x) * np.cos(7 * z), z], 1), faces, process=False)
    assert label(vox(waves))[1] == 1
    with pytest.raises(MeshError, match="holds no voxel at resolution 32"):
        vox(waves, keep_thin=False)


@pytest.mark.realdata
def test_a_car_body_is_a_shell(shared_data: Path) -> None:
    """Open below and at its windows: a shell of a voxel or two in one part, not rubble where lines happen to agree."""
    found = voxelize(load_mesh(shared_data / "meshes/classic/beetle.obj"), resolution=64)
    parts, _ = label(found, np.ones((3, 3, 3)))
    assert np.bincount(parts.ravel())[1:].max() > 0.95 * found.sum()
    inner = found[1:-1, 1:-1, 1:-1].copy()
    for axis in range(3):
        inner &= np.roll(found, 1, axis)[1:-1, 1:-1, 1:-1] & np.roll(found, -1, axis)[1:-1, 1:-1, 1:-1]
    assert inner.sum() < 0.02 * found.sum()


def test_tsdf_of_a_ball_and_of_a_box() -> None:
    points = centres(R)
    mesh = trimesh.creation.icosphere(subdivisions=6, radius=0.35)
    found = vox(mesh, field="tsdf", truncation=3.0)
    exact = np.clip((np.linalg.norm(points, axis=-1) - 0.35) * R / 3, -1, 1)
    assert found.dtype == np.float32
    # The icosphere of 82,000 faces lies up to 3e-5 of the cube inside the sphere: 3e-4 of the band.
    np.testing.assert_allclose(found, exact, atol=1e-3)

    q = np.abs(points - (np.array(LOW) + HIGH) / 2) - (np.array(HIGH) - LOW) / 2
    distance = np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)
    # Flat faces: nothing but the rounding of float32.
    np.testing.assert_allclose(vox(box(LOW, HIGH), field="tsdf"), np.clip(distance * R / 3, -1, 1), atol=1e-6)
    # Faces on planes of voxel centres: the distance there is 0, and the sign tells the inside all the same.
    on_centres = box((-8.5 / R,) * 3, (8.5 / R,) * 3)
    assert np.array_equal(vox(on_centres, field="tsdf") < 0, vox(on_centres))
    assert np.array_equal(vox(knot(), field="tsdf") < 0, vox(knot()))


def test_mesh_to_grid_to_mesh_to_grid() -> None:
    first = vox(knot(), resolution=64)
    again = vox(voxels_to_mesh(first), resolution=64)
    assert iou(first, again) > 0.95


def test_flat_and_empty_meshes_are_refused() -> None:
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    with pytest.raises(MeshError, match="is flat"):
        voxelize(flat)
    flat.apply_transform(trimesh.transformations.rotation_matrix(0.6, (1, 2, 0.5)))
    with pytest.raises(MeshError, match="is flat"):
        voxelize(flat)
    with pytest.raises(MeshError, match="holds no voxel"):
        vox(box((1, 1, 1), (2, 2, 2)))
    with pytest.raises(MeshError, match="extent"):
        normalize_mesh(trimesh.Trimesh([[1, 1, 1]] * 3, [[0, 1, 2]], process=False))


def test_what_lies_outside_the_cube_is_cut_off() -> None:
    found = vox(box((-2, -2, -2), (0.0, 2, 2)))
    assert np.array_equal(found, inside_box((-2, -2, -2), (0.0, 2, 2)))
