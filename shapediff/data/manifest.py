"""manifest.json of a data set: what the shards hold. Read as hostile text, since people share data sets."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from shapediff.errors import DataError

Field = Literal["occupancy", "tsdf"]
Split = Literal["train", "val", "test"]

FORMAT_VERSION = 1
FIELDS: tuple[str, ...] = get_args(Field)
SPLITS: tuple[str, ...] = get_args(Split)
MANIFEST_NAME = "manifest.json"
SHARDS_FOLDER = "shards"
MAX_RESOLUTION = 1024
_MAX_MANIFEST_BYTES = 2 << 30
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """One file in shards/: its plain name, the sha256 of its bytes, the number of shapes in it."""

    file: str
    sha256: str
    num: int


@dataclass(frozen=True)
class ShapeInfo:
    """One shape: where it came from, its class and split, and row `index` of shard number `shard`.

    `grid_sha256` is of the packed row. `transform` is the normalisation that took a mesh to the unit cube.
    """

    id: str
    source: str
    class_name: str
    split: Split
    shard: int
    index: int
    grid_sha256: str
    transform: dict[str, Any] | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A whole data set. `truncation_voxels` is 0 for occupancy; a class's label is its place in `classes`."""

    resolution: int
    field: Field
    truncation_voxels: float
    classes: list[str]
    shards: list[ShardInfo]
    shapes: list[ShapeInfo]

    def to_json(self) -> str:
        """ASCII JSON, one shape a line; the same data set always gives the same text."""
        head = {
            "format_version": FORMAT_VERSION,
            "resolution": self.resolution,
            "field": self.field,
            "truncation_voxels": self.truncation_voxels,
            "classes": self.classes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        shapes = ",\n".join(json.dumps(_shape_record(shape)) for shape in self.shapes)
        return json.dumps(head, indent=1)[:-2] + f',\n "shapes": [\n{shapes}\n]}}\n'

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The checked data set. Raises DataError naming the first thing that is wrong with the text."""
        record = _parse(text)
        version = record.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise DataError(
                f"the manifest has format_version {version!r}; this shapediff reads {FORMAT_VERSION}. "
                "Prepare the data set again, or use the shapediff that wrote it"
            )
        field = _one_of(record, "field", FIELDS, "the manifest")
        classes = _strings(record, "classes")
        shards = [_read_shard(entry, i) for i, entry in enumerate(_list(record, "shards"))]
        _refuse_repeats([shard.file for shard in shards], "shard file")
        shapes = [_read_shape(entry, i, classes=set(classes)) for i, entry in enumerate(_list(record, "shapes"))]
        _refuse_repeats([shape.id for shape in shapes], "shape id")
        _check_places(shapes, shards)
        return cls(
            resolution=_resolution(record),
            field=cast(Field, field),
            truncation_voxels=_truncation(record, field),
            classes=classes,
            shards=shards,
            shapes=shapes,
        )


def read_manifest(root: Path | str) -> Manifest:
    """The manifest of the data set in folder `root`. Raises DataError if there is none or it is not sound."""
    path = Path(root) / MANIFEST_NAME
    try:
        if path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is larger than {_MAX_MANIFEST_BYTES >> 30} GiB; it is not a data set's manifest")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"no data set in {root}: {path} does not exist. Make one with data_tools/prepare.py") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    try:
        return Manifest.from_json(text)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def split_of(shape_id: str) -> Split:
    """train, val or test with chances 90, 5 and 5 in 100, by a hash of the id: the same on every machine."""
    digest = hashlib.sha256(shape_id.encode("utf-8", "surrogateescape")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if place < 0.90 else "val" if place < 0.95 else "test"


def is_resolution(value: object) -> bool:
    """Whether a value can be the voxels a side of a stored grid: a power of two in [2, 1024]."""
    return type(value) is int and 2 <= value <= MAX_RESOLUTION and value & (value - 1) == 0


def _shape_record(shape: ShapeInfo) -> dict[str, Any]:
    record = {"class" if key == "class_name" else key: value for key, value in asdict(shape).items()}
    return {key: value for key, value in record.items() if value is not None}


def _parse(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON ({error}); the file is damaged, prepare the data set again") from error
    if not isinstance(record, dict):
        raise DataError("the manifest must be a JSON object; the file is damaged, prepare the data set again")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_shard(entry: Any, number: int) -> ShardInfo:
    where = f"shards[{number}]"
    file = _text(entry, "file", where)
    if not _PLAIN_NAME.fullmatch(file):
        raise DataError(f"{where}: file {file!r} is not a plain *.safetensors name in {SHARDS_FOLDER}/; beware of it")
    return ShardInfo(file=file, sha256=_sha256(entry, "sha256", where), num=_count(entry, "num", where, low=1))


def _read_shape(entry: Any, number: int, *, classes: set[str]) -> ShapeInfo:
    where = f"shapes[{number}]"
    class_name = _text(entry, "class", where)
    if class_name not in classes:
        raise DataError(f"{where}: class {class_name!r} is not in the list of classes")
    transform, caption = entry.get("transform"), entry.get("caption")
    if not isinstance(transform, dict | None) or not isinstance(caption, str | None):
        raise DataError(f"{where}: transform must be an object and caption a string")
    return ShapeInfo(
        id=_text(entry, "id", where),
        source=_text(entry, "source", where),
        class_name=class_name,
        split=cast(Split, _one_of(entry, "split", SPLITS, where)),
        shard=_count(entry, "shard", where),
        index=_count(entry, "index", where),
        grid_sha256=_sha256(entry, "grid_sha256", where),
        transform=transform,
        caption=caption,
    )


def _check_places(shapes: list[ShapeInfo], shards: list[ShardInfo]) -> None:
    for shape in shapes:
        if shape.shard >= len(shards) or shape.index >= shards[shape.shard].num:
            raise DataError(
                f"shape {shape.id!r} lies in row {shape.index} of shard {shape.shard}, which does not exist"
            )
    _refuse_repeats([(shape.shard, shape.index) for shape in shapes], "row")
    if len(shapes) != sum(shard.num for shard in shards):
        raise DataError(f"the shards hold {sum(s.num for s in shards)} shapes but {len(shapes)} are listed")


def _resolution(record: dict[str, Any]) -> int:
    resolution = record.get("resolution")
    if not is_resolution(resolution):
        raise DataError(f"resolution is {resolution!r}; it must be a power of two from 2 to {MAX_RESOLUTION}")
    return cast(int, resolution)


def _truncation(record: dict[str, Any], field: str) -> float:
    value = record.get("truncation_voxels")
    if type(value) not in (int, float) or not 0 <= cast(float, value) <= MAX_RESOLUTION:
        raise DataError(f"truncation_voxels is {value!r}; it must be a number from 0 to {MAX_RESOLUTION}")
    if (cast(float, value) > 0) != (field == "tsdf"):
        raise DataError(f"truncation_voxels is {value!r}; it must be above 0 for a tsdf and 0 for occupancy")
    return float(cast(float, value))


def _list(record: dict[str, Any], key: str) -> list[Any]:
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError(f"{key} must be a list that is not empty")
    return value


def _strings(record: dict[str, Any], key: str) -> list[str]:
    values = _list(record, key)
    if not all(isinstance(value, str) and value for value in values):
        raise DataError(f"{key} must be a list of names")
    _refuse_repeats(values, key)
    return values


def _get(entry: Any, key: str, where: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{where}: {key} is missing")
    return entry[key]


def _text(entry: Any, key: str, where: str) -> str:
    value = _get(entry, key, where)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} is {value!r}; it must be a string that is not empty")
    return value


def _one_of(entry: Any, key: str, choices: tuple[str, ...], where: str) -> str:
    value = _get(entry, key, where)
    if value not in choices:
        raise DataError(f"{where}: {key} is {value!r}; it must be one of {', '.join(choices)}")
    return cast(str, value)


def _count(entry: Any, key: str, where: str, *, low: int = 0) -> int:
    value = _get(entry, key, where)
    if type(value) is not int or not low <= value < 1 << 31:
        raise DataError(f"{where}: {key} is {value!r}; it must be an integer from {low} to 2^31 - 1")
    return value


def _sha256(entry: Any, key: str, where: str) -> str:
    value = _text(entry, key, where)
    if not _SHA256.fullmatch(value):
        raise DataError(f"{where}: {key} is {value!r}; it must be 64 hexadecimal digits")
    return value


def _refuse_repeats(values: list[Any], name: str) -> None:
    seen: set[Any] = set()
    for value in values:
        if value in seen:
            raise DataError(f"{name} {value!r} appears twice")
        seen.add(value)
