"""One mesh -> one packed grid, in a worker process, cached under the hash of the mesh and the settings."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shapediff.data.archives import READ_ERRORS, open_archive
from shapediff.data.manifest import FIELDS, Field, is_resolution
from shapediff.data.packing import ROW_DTYPES, Row, fill_fraction, pack_grid, row_length
from shapediff.data.shards import grid_hash, write_bytes
from shapediff.data.sources import Source
from shapediff.data.workers import serve
from shapediff.errors import ConfigError, MeshError
from shapediff.geometry.mesh import MAX_BYTES, MAX_FACES, buffer_uris, names_of_uri, read_beside, read_limited

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

_REPORTED = ("faces", "watertight", "method", "fill")


@dataclass(frozen=True)
class PrepareSettings:
    """What decides a grid: `truncation` is the TSDF's band in voxels, `up` the mesh's vertical axis."""

    resolution: int = 64
    field: Field = "occupancy"
    truncation: float = 3.0
    up: Literal["y", "z"] = "y"

    def __post_init__(self) -> None:
        if not is_resolution(self.resolution) or self.resolution < 8:
            raise ConfigError(f"resolution={self.resolution}; use a power of two from 8 to 1024, such as 32, 64 or 128")
        if self.field not in FIELDS:
            raise ConfigError(f"field={self.field!r}; use one of {', '.join(FIELDS)}")
        if not 0 < self.truncation <= self.resolution:
            raise ConfigError(f"truncation={self.truncation} voxels; use a number up to {self.resolution}, such as 3")
        if self.up not in ("y", "z"):
            raise ConfigError(f"up={self.up!r}; use 'y' or 'z'")


@dataclass(frozen=True)
class MeshLimits:
    """What a mesh may take; `max_memory` bytes in a worker process. Limits decide what is skipped, never what a grid is."""

    max_faces: int = MAX_FACES
    max_bytes: int = MAX_BYTES
    max_memory: int = 8 << 30

    def __post_init__(self) -> None:
        for name, low in (("max_faces", 1), ("max_bytes", 1), ("max_memory", 64 << 20)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)}; use a number of {low} or more")


def main() -> None:
    """The worker process."""
    _warm_up()
    limit_memory_once = lru_cache(maxsize=1)(_limit_memory)

    def handle(job: dict[str, Any]) -> dict[str, Any]:
        limit_memory_once(job["limits"]["max_memory"])
        return do_job(job)

    serve(handle)


def _warm_up() -> None:
    """All imported and compiled before the first mesh's time starts: the loops of voxelization take half a minute when new."""
    import trimesh

    from shapediff.geometry.voxelize import find_solid, signed_distance

    closed = trimesh.creation.box((0.5, 0.5, 0.5))
    for mesh in (closed, trimesh.Trimesh(closed.vertices, closed.faces[:-1], process=False)):
        signed_distance(mesh, find_solid(mesh, resolution=8).grid, truncation=1.0)


def make_job(source: Source, settings: PrepareSettings, limits: MeshLimits, cache: Path) -> dict[str, Any]:
    """The request for one mesh, as JSON."""
    return {
        "path": str(source.path.absolute()),
        "member": source.member,
        "suffix": source.suffix,
        "problem": source.problem,
        "cache": str(cache.absolute()),
        "settings": asdict(settings),
        "limits": asdict(limits),
        "code": code_version(),
    }


def _limit_memory(max_memory: int) -> None:
    """Let this process take that much more than it has now, where the system can see to it."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _data_bytes() + max_memory
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _data_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    except (OSError, StopIteration):
        return 0


def do_job(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare one mesh, or find it prepared: {"line": its ReportLine but the source, "key": the cache's, "grid_sha256"}.

    {"fatal": why} where no other mesh would fare better; {"fatal": why, "unwritable": True} if the cache cannot be written.
    """
    started = time.perf_counter()
    done = {"key": "", "grid_sha256": ""}
    if job["code"] != code_version():
        return {"fatal": "another version of shapediff runs there; install the same one everywhere"}
    try:
        if job["problem"]:
            raise MeshError(job["problem"])
        settings, limits, cache = PrepareSettings(**job["settings"]), MeshLimits(**job["limits"]), Path(job["cache"])
        content, beside = _contents(job, limits)
        done["key"] = key = _cache_key(content, beside, job["suffix"], settings)
        cached = read_grid(cache, key, settings)
        row, facts = cached or _voxelize(content, beside, job["suffix"], settings, limits)
        if facts["faces"] > limits.max_faces:
            raise MeshError(f"has {facts['faces']} faces, more than the limit of {limits.max_faces}; raise --max-faces")
        if cached is None:
            try:
                _write_grid(cache, key, row, facts)
            except OSError as error:
                return {"fatal": f"{cache} cannot be written: {error}", "unwritable": True}
        done["grid_sha256"] = facts["grid_sha256"]
        line = {"status": "ok", "reused": cached is not None, **{name: facts[name] for name in _REPORTED}}
    except MeshError as error:
        line = {"status": "skipped", "reason": str(error)}
    except MemoryError:
        line = {"status": "skipped", "reason": "needs more memory than it may take; raise --max-memory"}
    except Exception as error:  # a reader's bug or a full memory must cost this mesh alone; the reason is reported
        line = {"status": "skipped", "reason": f"{type(error).__name__}: {error}"}
    return {"line": {**line, "seconds": round(time.perf_counter() - started, 4)}, **done}


def read_grid(cache: Path, key: str, settings: PrepareSettings) -> tuple[Row, dict[str, Any]] | None:
    """The row under a key and its facts: faces, watertight, method, fill, transform, grid_sha256.

    None if it is not there or is damaged, in which case it is made again.
    """
    try:
        head, packed = _grid_path(cache, key).read_bytes().split(b"\n", 1)
        facts = json.loads(head)
        content = zlib.decompressobj().decompress(packed, row_length(settings.resolution, settings.field))
        row = np.frombuffer(content, dtype=ROW_DTYPES[settings.field])
        return (row, facts) if facts["grid_sha256"] == grid_hash(row) else None
    except (OSError, ValueError, KeyError, TypeError, zlib.error):
        return None


def _write_grid(cache: Path, key: str, row: Row, facts: dict[str, Any]) -> None:
    """One line of JSON, then the row, deflated: a solid 64^3 takes 2 to 3 kB."""
    write_bytes(_grid_path(cache, key), json.dumps(facts).encode("ascii") + b"\n" + zlib.compress(row.tobytes(), 1))


def prune(cache: Path, *, keys: Collection[str], archives: Collection[Path]) -> None:
    """Remove the grids of other meshes, settings and versions, and the copies of other archives."""
    stale = [path for path in cache.glob("*/*.grid") if path.stem not in keys]
    for path in (*stale, *(path for path in cache.glob("*.tar") if path not in archives)):
        path.unlink(missing_ok=True)


def _grid_path(cache: Path, key: str) -> Path:
    return cache / key[:2] / f"{key}.grid"


def _contents(job: dict[str, Any], limits: MeshLimits) -> tuple[bytes, dict[str, bytes]]:
    """The bytes of the mesh file and, for a .gltf, of the buffers that it names, by URI."""
    path, member, beside = Path(job["path"]), job["member"], dict[str, bytes]()
    archive = open_archive(path) if member else None
    try:
        content = archive.read(member, limits.max_bytes) if archive else read_limited(path, limits.max_bytes)
        room = limits.max_bytes - len(content)
        for uri in buffer_uris(content) if job["suffix"] == ".gltf" and room >= 0 else ():
            names = names_of_uri(uri)
            found = archive.read_beside(member, names, room) if archive else read_beside(path.parent, names, room)
            if found is not None:
                beside[uri], room = found, room - len(found)
    except READ_ERRORS as error:
        raise MeshError(f"cannot be read{' from its archive' if archive else ''}: {error}") from error
    if room < 0:
        raise MeshError(f"is larger than the limit of {limits.max_bytes} bytes; raise --max-megabytes")
    return content, beside


def _voxelize(
    content: bytes, beside: dict[str, bytes], suffix: str, settings: PrepareSettings, limits: MeshLimits
) -> tuple[Row, dict[str, Any]]:
    from shapediff.geometry.mesh import normalize_mesh, parse_mesh
    from shapediff.geometry.voxelize import find_solid, signed_distance

    def buffer(uri: str) -> bytes:
        if uri not in beside:
            raise MeshError(f"names {uri[:80]!r}, which is no file beside it")
        return beside[uri]

    mesh = parse_mesh(
        content, suffix, up=settings.up, beside=buffer, max_faces=limits.max_faces, max_bytes=limits.max_bytes
    )
    unit_mesh, transform = normalize_mesh(mesh)
    solid = find_solid(unit_mesh, resolution=settings.resolution)
    is_tsdf = settings.field == "tsdf"
    grid = signed_distance(unit_mesh, solid.grid, truncation=settings.truncation) if is_tsdf else solid.grid
    row = pack_grid(grid, field=settings.field)
    return row, {
        "faces": len(mesh.faces),
        "watertight": bool(mesh.is_watertight),
        "method": " + ".join(solid.methods),
        "fill": float(fill_fraction(row[None], field=settings.field)[0]),
        "transform": transform.to_dict(),
        "grid_sha256": grid_hash(row),
    }


def _cache_key(content: bytes, beside: dict[str, bytes], suffix: str, settings: PrepareSettings) -> str:
    """The sha256 of all that decides the grid: settings, code, the file and, of a .gltf, the buffers that it names."""
    digest = hashlib.sha256(json.dumps([asdict(settings), suffix, code_version()]).encode())
    for uri, file in (("", content), *beside.items()):
        digest.update(hashlib.sha256(uri.encode("utf-8", "surrogatepass")).digest() + hashlib.sha256(file).digest())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_version() -> str:
    """The sha256 of the code that turns a file into a grid: another version does not reuse its grids."""
    import shapediff.geometry

    folder = Path(shapediff.geometry.__path__[0])
    files = [folder / "mesh.py", folder / "voxelize.py", *sorted((folder / "kernels").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
