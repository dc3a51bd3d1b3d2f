"""One mesh -> one packed grid, in a worker process, cached under the hash of the mesh and the settings."""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shapediff.data.manifest import FIELDS, Field, is_resolution
from shapediff.data.packing import ROW_DTYPES, Row, fill_fraction, pack_grid, row_length
from shapediff.data.shards import grid_hash, write_bytes
from shapediff.data.workers import serve
from shapediff.errors import ConfigError, MeshError


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


def main() -> None:
    """The worker process."""
    import shapediff.geometry.mesh
    import shapediff.geometry.voxelize  # noqa: F401  (both imported before the first job's time starts)

    serve(do_job)


def make_job(path: Path, settings: PrepareSettings, cache: Path) -> dict[str, Any]:
    """The request for one mesh, as JSON."""
    return {"path": str(path), "cache": str(cache), "settings": asdict(settings)}


def do_job(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare one mesh, or find it prepared: {"line": its ReportLine but the source, "key": the cache's}."""
    started = time.perf_counter()
    key = ""
    try:
        settings, path, cache = PrepareSettings(**job["settings"]), Path(job["path"]), Path(job["cache"])
        key = _cache_key(path, settings)
        cached = read_grid(cache, key, settings)
        row, facts = cached or _voxelize(path, settings)
        if cached is None:
            _write_grid(cache, key, row, facts)
        line = {
            "status": "ok",
            "reused": cached is not None,
            **{name: facts[name] for name in ("faces", "watertight", "fill")},
        }
    except MeshError as error:
        line = {"status": "skipped", "reason": str(error)}
    except Exception as error:  # a reader's bug or a full memory must cost this mesh alone; the reason is reported
        line = {"status": "skipped", "reason": f"{type(error).__name__}: {error}"}
    return {"line": {**line, "seconds": round(time.perf_counter() - started, 4)}, "key": key}


def read_grid(cache: Path, key: str, settings: PrepareSettings) -> tuple[Row, dict[str, Any]] | None:
    """The row under a key and its facts: faces, watertight, fill, transform, grid_sha256.

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


def _grid_path(cache: Path, key: str) -> Path:
    return cache / key[:2] / f"{key}.grid"


def _voxelize(path: Path, settings: PrepareSettings) -> tuple[Row, dict[str, Any]]:
    from shapediff.geometry.mesh import load_mesh, normalize_mesh
    from shapediff.geometry.voxelize import voxelize

    mesh = load_mesh(path, up=settings.up)
    unit_mesh, transform = normalize_mesh(mesh)
    grid = voxelize(
        unit_mesh,
        resolution=settings.resolution,
        field=settings.field,
        truncation=settings.truncation,
        normalize=False,
    )
    row = pack_grid(grid, field=settings.field)
    fill = float(fill_fraction(row[None], field=settings.field)[0])
    if fill == 0.0:
        raise MeshError("no voxel lies inside it: it is too thin for this resolution, or flat")
    return row, {
        "faces": len(mesh.faces),
        "watertight": bool(mesh.is_watertight),
        "fill": fill,
        "transform": transform.to_dict(),
        "grid_sha256": grid_hash(row),
    }


def _cache_key(path: Path, settings: PrepareSettings) -> str:
    """The sha256 of all that decides the grid: settings, code, the file and, for .gltf, buffers beside it."""
    suffix = path.suffix.lower()
    digest = hashlib.sha256(json.dumps([asdict(settings), suffix, _code_version()]).encode())
    buffers = sorted(path.parent.glob("*.bin")) if suffix == ".gltf" else []
    for file in (path, *buffers):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def _code_version() -> str:
    """The sha256 of the code that turns a file into a grid: another version does not reuse its grids."""
    import shapediff.geometry

    folder = Path(shapediff.geometry.__path__[0])
    files = [folder / "mesh.py", folder / "voxelize.py", *sorted((folder / "kernels").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
