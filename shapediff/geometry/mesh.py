"""Reading meshes that nobody has checked, and placing them in the unit cube."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

import numpy as np

from shapediff.errors import MeshError

if TYPE_CHECKING:
    import trimesh

READABLE_SUFFIXES = (".obj", ".off", ".ply", ".stl", ".glb", ".gltf", ".3mf", ".dae", ".zae", ".xaml")
_ZIPPED, _XML = (".3mf", ".zae"), (".dae", ".xaml")
MAX_FACES = 5_000_000
MAX_BYTES = 1 << 30
LONGEST_SIDE = 15 / 16
"""What normalisation makes of the longest side of the bounding box: at 32^3 a voxel of air is left all around."""


@dataclass(frozen=True)
class Transform:
    """Where a normalised mesh came from: unit = scale * (source + offset)."""

    scale: float
    offset: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def load_mesh(
    path: str | Path, *, up: Literal["y", "z"] = "y", max_faces: int = MAX_FACES, max_bytes: int = MAX_BYTES
) -> trimesh.Trimesh:
    """Read one mesh: the parts of a scene are merged under their transforms, materials and textures are left aside.

    Nothing but the file itself is read, save buffers of a .gltf in the same folder or below. `up="z"` turns a mesh with z up so
    that y is up and what faced -y faces +z. Vertices are float64, as in the file, equal ones merged.

    Raises MeshError, saying why, for a file that cannot be read, is too large or holds no faces, for indices that name no
    vertex, and for coordinates that are not finite.
    """
    path = Path(path)
    suffix = _known(path.suffix)
    try:
        content = read_limited(path, max_bytes)
    except OSError as error:
        raise MeshError(f"cannot be read: {error}") from error
    return parse_mesh(
        content,
        suffix,
        up=up,
        beside=lambda uri: _buffer_beside(path.parent, uri, max_bytes),
        max_faces=max_faces,
        max_bytes=max_bytes,
    )


def read_limited(path: Path, max_bytes: int) -> bytes:
    """The bytes of a plain file, max_bytes + 1 of them at most. Raises OSError, also for a pipe or a device."""
    if not path.is_file():
        raise OSError("it is not a file" if path.exists() else "it is not there")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size  # asked for in full, since read() takes that room at once
        return stream.read(min(size, max_bytes) + 1)


def buffer_uris(content: bytes) -> list[str]:
    """What a .gltf needs beside itself: the URIs of its buffers, each once; none of one that cannot be read."""
    try:
        uris = [buffer.get("uri") for buffer in json.loads(content)["buffers"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return list(dict.fromkeys(uri for uri in uris if isinstance(uri, str) and not uri.startswith("data:")))


def names_of_uri(uri: str) -> list[str]:
    """The paths that a relative URI may mean: with its %20 and the like resolved, or, of a careless exporter, as it stands."""
    return list(dict.fromkeys((unquote(uri.strip()).removeprefix("./"), uri.strip())))


def read_beside(folder: Path, names: list[str], max_bytes: int) -> bytes | None:
    """The bytes of the first of `names` that is a plain file in `folder` or below it; None if none is. Raises OSError."""
    root = folder.resolve()
    for name in names:
        target = (root / name).resolve() if "\0" not in name else root
        if root in target.parents and target.is_file():
            return read_limited(target, max_bytes)
    return None


def parse_mesh(
    content: bytes,
    suffix: str,
    *,
    up: Literal["y", "z"] = "y",
    beside: Callable[[str], bytes] | None = None,
    max_faces: int = MAX_FACES,
    max_bytes: int = MAX_BYTES,
) -> trimesh.Trimesh:
    """The mesh in the bytes of a file with this suffix; see `load_mesh`. `beside` reads a buffer that a .gltf names."""
    suffix = _known(suffix)
    if len(content) > max_bytes:
        raise MeshError(f"is larger than the limit of {max_bytes} bytes; raise --max-megabytes")
    vertices, faces = _read(content, suffix, beside, max_bytes)
    if not len(faces):
        raise MeshError("holds no faces")
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise MeshError(f"holds vertices {vertices.shape} and faces {faces.shape}, which must be rows of three")
    if len(faces) > max_faces:
        raise MeshError(f"has {len(faces)} faces, more than the limit of {max_faces}; raise --max-faces")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MeshError(f"a face names vertex {faces.max()} of {len(vertices)}")
    if not np.isfinite(vertices[faces.ravel()]).all():
        raise MeshError("has coordinates that are not finite")
    if up == "z":
        vertices = vertices[:, [0, 2, 1]] * [1, 1, -1]
    return _merged(vertices, faces)


def normalize_mesh(mesh: trimesh.Trimesh) -> tuple[trimesh.Trimesh, Transform]:
    """A copy with the centre of its bounding box at 0 and its longest side 15/16, and how it came there.

    Raises MeshError for a mesh without extent.
    """
    low, high = mesh.bounds
    side = float((high - low).max())
    if not 0 < side < np.inf:
        raise MeshError("has no extent")
    offset = -(low + high) / 2
    scale = LONGEST_SIDE / side
    placed = mesh.copy()
    placed.vertices = scale * (mesh.vertices + offset)
    return placed, Transform(scale, tuple(offset.tolist()))


def _known(suffix: str) -> str:
    if suffix.lower() not in READABLE_SUFFIXES:
        raise MeshError(f"{suffix or 'a file without suffix'} cannot be read; use {', '.join(READABLE_SUFFIXES)}")
    return suffix.lower()


def _read(
    content: bytes, suffix: str, beside: Callable[[str], bytes] | None, max_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of every part, through trimesh; whatever goes wrong in there is a MeshError."""
    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    try:
        _refuse_traps(content, suffix, max_bytes)
        scene = trimesh.load_scene(
            io.BytesIO(content),
            file_type=suffix[1:],
            resolver=_resolver(beside) if suffix == ".gltf" and beside is not None else None,
            skip_materials=True,
            process=False,
            allow_remote=False,
        )
        mesh = scene.to_mesh()
        return np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    except MeshError:
        raise
    except MemoryError as error:
        raise MeshError("needs more memory than it may take; raise --max-memory") from error
    except Exception as error:  # readers of foreign formats raise anything; the reason is kept
        raise MeshError(f"cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def _refuse_traps(content: bytes, suffix: str, max_bytes: int) -> None:
    """Zip bombs, and XML whose entities grow or name other files: the readers behind trimesh would follow them."""
    if suffix in (*_ZIPPED, *_XML) and zipfile.is_zipfile(io.BytesIO(content)):  # what reads a .dae unpacks one, too
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
            if unpacked > max_bytes:
                raise MeshError(
                    f"unpacks to {unpacked} bytes, more than the limit of {max_bytes}; raise --max-megabytes"
                )
            for info in archive.infolist():
                _refuse_entities(archive.read(info))
    elif suffix in _XML:
        _refuse_entities(content)


def _refuse_entities(content: bytes) -> None:
    if b"<!DOCTYPE" in content.replace(b"\0", b"") or b"<!ENTITY" in content.replace(b"\0", b""):
        raise MeshError("declares XML entities, which no mesh needs")


def _resolver(beside: Callable[[str], bytes]) -> Any:
    """What trimesh asks for the buffers of a .gltf."""
    import trimesh

    class Beside(trimesh.resolvers.Resolver):
        def __init__(self) -> None:
            pass

        def get(self, name: str) -> bytes:
            return beside(name)

        def write(self, name: str, data: Any) -> None:
            raise MeshError("nothing is written while reading")

        def namespaced(self, namespace: str) -> Any:
            return self

        def keys(self) -> list[str]:
            return []

    return Beside()


def _buffer_beside(folder: Path, uri: str, max_bytes: int) -> bytes:
    content = read_beside(folder, names_of_uri(uri), max_bytes)
    if content is None:
        raise MeshError(f"names {uri[:80]!r}, which is no file beside it")
    return content


def _merged(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    """One mesh in which vertices at the same place are one, faces without area or said twice are gone."""
    import trimesh

    used = vertices[faces.ravel()]
    # Files round to some 6 digits: what lies closer together than that is one vertex.
    grain = 1e-7 * max(float(np.ptp(used, axis=0).max()), 1e-300)
    offset = used.min(0)
    _, first, inverse = np.unique(hash_rows(np.round((used - offset) / grain)), return_index=True, return_inverse=True)
    triangles = inverse.reshape(-1, 3)
    corners = np.sort(triangles, 1)
    is_proper = (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
    _, kept = np.unique(hash_rows(corners[is_proper]), return_index=True)
    if not len(kept):
        raise MeshError("holds no face with an area")
    return trimesh.Trimesh(used[first], triangles[is_proper][np.sort(kept)], process=False)


def hash_rows(rows: np.ndarray) -> np.ndarray:
    """One int64 a row (n, 3) of whole numbers: sorting these is ten times quicker than sorting rows, and they do not collide."""
    factors = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64).astype(np.int64)
    mixed = rows.astype(np.int64) * factors
    return (mixed ^ (mixed >> 29)) @ factors[::-1]
