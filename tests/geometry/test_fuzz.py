"""Damaged and hostile mesh files: whatever the bytes, a sound mesh or one MeshError, soon and in little memory."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from functools import lru_cache

import numpy as np
import pytest
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shapediff.errors import MeshError
from shapediff.geometry.mesh import READABLE_SUFFIXES, normalize_mesh, parse_mesh
from shapediff.geometry.voxelize import voxelize
from tests.geometry.test_mesh import as_xaml

SEEDS = {".ply": ("binary", "ascii"), ".stl": ("binary", "ascii")}
NUM_EXAMPLES = int(os.environ.get("SHAPEDIFF_FUZZ_EXAMPLES", "60"))
MAX_SECONDS, MAX_GROWTH = 10.0, 1 << 30
FUZZ = settings(
    max_examples=NUM_EXAMPLES,
    deadline=1000 * MAX_SECONDS,
    derandomize=NUM_EXAMPLES < 1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@lru_cache
def whole_file(suffix: str, kind: str = "") -> bytes:
    """A small sound file of each format."""
    mesh = trimesh.creation.icosphere(subdivisions=1)
    if suffix == ".gltf":
        return trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh), embed_buffers=True)["model.gltf"]
    if suffix == ".xaml":
        return as_xaml(mesh).encode()
    if suffix == ".zae":
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("a.dae", mesh.export(file_type="dae"))
        return content.getvalue()
    if kind:
        content = mesh.export(
            file_type="stl_ascii" if suffix == ".stl" and kind == "ascii" else suffix[1:],
            **({"encoding": kind} if suffix == ".ply" else {}),
        )
    else:
        content = mesh.export(file_type=suffix[1:])
    return content.encode() if isinstance(content, str) else content


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The file cut off, with bytes changed, parts doubled or moved, and numbers replaced by extreme ones."""
    place = st.integers(0, len(content))
    extreme = st.sampled_from(
        [
            b"nan",
            b"inf",
            b"-1",
            b"1e999",
            b"999999999999",
            b"4294967295",
            b"\xff\xff\xff\xff",
            b"\0\0\0\0",
            b"../x",
            b"\n",
            b" ",
            b"0",
        ]
    )
    piece = st.one_of(extreme, st.binary(max_size=16))

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        result = content
        for _ in range(draw(st.integers(1, 4))):
            i, j = sorted((draw(place), draw(place)))
            kind = draw(st.integers(0, 4))
            if kind == 0:
                result = result[:i]
            elif kind == 1:
                new = draw(piece)
                result = result[:i] + new + result[i + len(new) :]
            elif kind == 2:
                result = result[:i] + draw(piece) + result[i:]
            elif kind == 3:
                result = result[:i] + result[j:]
            else:
                result = result[:j] + result[i:j] + result[j:]
        return result

    return edited()


def check(content: bytes, suffix: str) -> None:
    try:
        mesh = parse_mesh(content, suffix, max_bytes=1 << 24)
    except MeshError:
        return
    assert len(mesh.faces) and mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
    assert np.isfinite(mesh.vertices).all()
    try:
        grid = voxelize(normalize_mesh(mesh)[0], resolution=8, field="tsdf", normalize=False)
    except MeshError:
        return
    assert np.isfinite(grid).all() and np.abs(grid).max() <= 1 and (grid < 0).any()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize(
    ("suffix", "kind"), [(suffix, kind) for suffix in READABLE_SUFFIXES for kind in SEEDS.get(suffix, ("",))]
)
def test_damaged_files(suffix: str, kind: str) -> None:
    content = whole_file(suffix, kind)
    check(content, suffix)
    before = peak_bytes()

    @FUZZ
    @given(damaged(content))
    def run(changed: bytes) -> None:
        check(changed, suffix)

    run()
    assert peak_bytes() - before < MAX_GROWTH


@pytest.mark.parametrize("suffix", READABLE_SUFFIXES)
def test_any_bytes(suffix: str) -> None:
    @FUZZ
    @given(st.binary(max_size=400))
    def run(content: bytes) -> None:
        check(content, suffix)

    run()


NUMBERS = st.one_of(
    st.floats(width=32),
    st.integers(-(2**70), 2**70),
    st.sampled_from(["nan", "inf", "1e400", "1e-400", "", "x", "0x10", "1/2/3", "-0"]),
)


@pytest.mark.parametrize("suffix", [".obj", ".off"])
def test_any_text_of_the_right_form(suffix: str) -> None:
    """Rows of numbers after the format's own words, with counts that may lie."""
    words = {".obj": ["v", "f", "vn", "vt", "g", "o", "l", "usemtl", "mtllib"], ".off": ["3", "4", "2", "5"]}[suffix]
    row = st.tuples(st.sampled_from(words), st.lists(NUMBERS, max_size=6)).map(
        lambda r: " ".join(map(str, (r[0], *r[1])))
    )

    @FUZZ
    @given(st.lists(row, max_size=25), st.tuples(NUMBERS, NUMBERS, NUMBERS))
    def run(rows: list[str], counts: tuple) -> None:
        head = ["OFF", " ".join(map(str, counts))] if suffix == ".off" else []
        check("\n".join([*head, *rows]).encode(), suffix)

    run()


def test_hundred_thousand_faces_of_soup_end_soon() -> None:
    """Random triangles all through each other, none sharing a vertex."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(-0.4, 0.4, (100_000, 1, 3)) + rng.uniform(-0.03, 0.03, (100_000, 3, 3))
    soup = trimesh.Trimesh(corners.reshape(-1, 3), np.arange(300_000).reshape(-1, 3), process=False)
    content = soup.export(file_type="stl")
    mesh = parse_mesh(content, ".stl")
    assert len(mesh.faces) == 100_000
    grid = voxelize(mesh, resolution=32, field="tsdf", normalize=False)
    assert np.isfinite(grid).all()
