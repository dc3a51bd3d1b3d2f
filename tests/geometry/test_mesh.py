"""Reading meshes: each format, scenes with transforms, and files that lie."""

from __future__ import annotations

import contextlib
import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapediff.errors import MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES, load_mesh, normalize_mesh


def as_xaml(mesh: trimesh.Trimesh) -> str:
    positions, indices, normals = (
        " ".join(map(str, np.asarray(values).ravel())) for values in (mesh.vertices, mesh.faces, mesh.vertex_normals)
    )
    return (
        '<Viewport3D xmlns="http://schemas.microsoft.com/winfx/2006/xaml/presentation"><ModelVisual3D><ModelVisual3D.Content>'
        "<GeometryModel3D><GeometryModel3D.Geometry>"
        f'<MeshGeometry3D Positions="{positions}" TriangleIndices="{indices}" Normals="{normals}"/>'
        "</GeometryModel3D.Geometry></GeometryModel3D></ModelVisual3D.Content></ModelVisual3D></Viewport3D>"
    )


@pytest.mark.parametrize("suffix", READABLE_SUFFIXES)
def test_every_format_reads_the_same_mesh(tmp_path: Path, suffix: str) -> None:
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=2.0)
    path = tmp_path / f"a{suffix}"
    if suffix == ".gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "model.gltf").rename(path)
    elif suffix == ".zae":  # a .dae in a zip
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.dae", mesh.export(file_type="dae"))
    elif suffix == ".xaml":
        path.write_text(as_xaml(mesh))
    else:
        mesh.export(path)
    found = load_mesh(path)
    assert len(found.faces) == len(mesh.faces)
    assert found.is_watertight  # vertices that a format says thrice are one again
    assert found.volume == pytest.approx(mesh.volume, rel=1e-4)


def test_scene_parts_are_merged_under_their_transforms(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=trimesh.transformations.translation_matrix((5, 0, 0)))
    scene.add_geometry(trimesh.creation.box((1, 2, 1)))
    scene.export(tmp_path / "a.glb")
    found = load_mesh(tmp_path / "a.glb")
    np.testing.assert_allclose(found.bounds, [[-0.5, -1, -0.5], [5.5, 1, 0.5]])
    assert found.body_count == 2


def test_up_is_turned_and_normalising_can_be_undone(tmp_path: Path) -> None:
    mesh = trimesh.creation.box((1, 2, 6))
    mesh.apply_translation((3, 4, 5))
    mesh.export(tmp_path / "a.obj")
    turned = load_mesh(tmp_path / "a.obj", up="z")
    np.testing.assert_allclose(turned.extents, (1, 6, 2))
    np.testing.assert_allclose(turned.bounds.mean(0), (3, 5, -4))
    assert turned.volume > 0
    placed, transform = normalize_mesh(turned)
    np.testing.assert_allclose(placed.bounds, np.array([[-1, -6, -2], [1, 6, 2]]) / 6 * 15 / 32)
    np.testing.assert_allclose(placed.vertices / transform.scale - transform.offset, turned.vertices, atol=1e-12)


OBJ = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\n"
PLY = b"ply\nformat binary_little_endian 1.0\nelement vertex %d\nproperty float x\nproperty float y\nproperty float z\n"
HOSTILE = {
    "empty.obj": b"",
    "points.obj": b"v 0 0 0\nv 1 0 0\nv 0 1 0\n",
    "range.obj": OBJ.replace("f 1 2 4", "f 1 2 9").encode(),
    "nan.obj": OBJ.replace("v 0 0 1", "v 0 0 nan").encode(),
    "inf.off": b"OFF\n3 1 0\n0 0 0\n1 0 inf\n0 1 0\n3 0 1 2\n",
    "plane.obj": b"v 0 0\nv 1 0\nv 0 1\nv 1 1\nf 1 2 3\nf 2 3 4\n",
    "noise.stl": bytes(range(256)) * 4,
    "short.stl": b"\0" * 80 + struct.pack("<I", 1000) + b"\0" * 60,
    "vast.stl": b"\0" * 80 + struct.pack("<I", 2**32 - 1) + b"\0" * 50,
    "vast.ply": PLY % 10**12 + b"end_header\n\0\0\0\0",
    "vast.off": b"OFF\n999999999999 999999999999 0\n0 0 0\n",
    "noise.glb": b"glTF" + bytes(range(100)),
    "long.glb": b"glTF" + struct.pack("<III", 2, 2**31, 2**31) + b"JSON",
    "deep.gltf": b"[" * 100_000,
    "speck.obj": b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_one_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(MeshError):
        load_mesh(tmp_path / name)


BILLION_LAUGHS = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<COLLADA><asset>&b;</asset></COLLADA>"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_entities_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.dae").write_bytes(BILLION_LAUGHS.encode(encoding))
    with pytest.raises(MeshError, match="XML entities"):
        load_mesh(tmp_path / "a.dae")
    with zipfile.ZipFile(tmp_path / "a.3mf", "w") as archive:
        archive.writestr("3D/3dmodel.model", BILLION_LAUGHS.encode(encoding))
    with pytest.raises(MeshError, match="XML entities"):
        load_mesh(tmp_path / "a.3mf")
    with zipfile.ZipFile(
        tmp_path / "b.dae", "w", zipfile.ZIP_DEFLATED
    ) as archive:  # its reader unpacks zips of any suffix
        archive.writestr("a.dae", BILLION_LAUGHS.encode(encoding))
    with pytest.raises(MeshError, match="XML entities"):
        load_mesh(tmp_path / "b.dae")


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.3mf", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("3D/3dmodel.model", b" " * 50_000_000)
    for name in ("a.3mf", "a.dae"):
        (tmp_path / name).write_bytes((tmp_path / "a.3mf").read_bytes())
        with pytest.raises(MeshError, match="unpacks to 50000000 bytes"):
            load_mesh(tmp_path / name, max_bytes=1_000_000)


def test_gltf_nodes_that_hold_each_other_end(tmp_path: Path) -> None:
    """A cycle, and a chain of 5,000 nodes: an error or the mesh, not a hang or a crash."""
    for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box())).items():
        (tmp_path / name).write_bytes(content)
    tree = json.loads((tmp_path / "model.gltf").read_text())
    for children in ([[1], [0]], [[i + 1] for i in range(5000)] + [[]]):
        nodes = [{"children": c} if c else {} for c in children]
        nodes[-1]["mesh"] = 0
        (tmp_path / "model.gltf").write_text(
            json.dumps({**tree, "nodes": nodes, "scenes": [{"nodes": [0]}], "scene": 0})
        )
        with contextlib.suppress(MeshError):
            assert len(load_mesh(tmp_path / "model.gltf").faces) == 12


@pytest.mark.parametrize("uri", ["../secret.bin", "/etc/passwd", "http://localhost:1/x.bin", "file:///etc/passwd"])
def test_buffers_elsewhere_are_never_read(tmp_path: Path, uri: str) -> None:
    folder = tmp_path / "meshes"
    folder.mkdir()
    for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.creation.box())).items():
        (folder / name).write_bytes(content)
    tree = json.loads((folder / "model.gltf").read_text())
    buffer = tree["buffers"][0]["uri"]
    (tmp_path / "secret.bin").write_bytes((folder / buffer).read_bytes())
    assert len(load_mesh(folder / "model.gltf").faces) == 12
    for entry in tree["buffers"]:
        entry["uri"] = uri
    (folder / "model.gltf").write_text(json.dumps(tree))
    with pytest.raises(MeshError, match=r"no file beside it|cannot be read"):
        load_mesh(folder / "model.gltf")


def test_textures_and_materials_are_left_aside(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("mtllib /etc/passwd\nusemtl x\n" + OBJ)
    assert len(load_mesh(tmp_path / "a.obj").faces) == 2


def test_limits_and_unknown_formats(tmp_path: Path) -> None:
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "a.stl")
    with pytest.raises(MeshError, match="320 faces, more than the limit of 100"):
        load_mesh(tmp_path / "a.stl", max_faces=100)
    with pytest.raises(MeshError, match="larger than the limit of 100 bytes"):
        load_mesh(tmp_path / "a.stl", max_bytes=100)
    with pytest.raises(MeshError, match=r"\.fbx cannot be read; use \.obj"):
        load_mesh(tmp_path / "a.fbx")
    with pytest.raises(MeshError, match="is not there"):
        load_mesh(tmp_path / "none.obj")
