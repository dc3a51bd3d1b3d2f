"""The files of one saved state: a file of tensors from each rank, progress.json, and a manifest that holds their hashes.

The layout says what belongs to which weights, not who held it: every piece of a file names its parameter and where in it
it starts, so that any number of ranks reads what any number wrote. Tensors are stored as safetensors, without pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from shapediff.errors import CheckpointError

FORMAT, FORMAT_VERSION = "shapediff-state", 1
PROGRESS_FILE, MANIFEST_FILE = "progress.json", "manifest.json"
CHUNK_BYTES = 1 << 24
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file."""

    sha256: str
    size: int


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def finished_states(directory: Path) -> list[Path]:
    """The folders of all published states, oldest first."""
    return sorted(path for path in directory.glob("step-*") if path.is_dir() and not path.suffix)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> FileFacts:
    """Write a safetensors file to the disk itself, one tensor at a time, so that no second copy of all is ever in memory.

    `starts` says, for tensors that are pieces, at which element of the flattened whole they start. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"starts": json.dumps(starts)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return _write(path, (len(text).to_bytes(8, "little"), text), (_bytes(tensor) for tensor in tensors.values()))


def write_json_file(path: Path, value: Any) -> FileFacts:
    """Write JSON to the disk itself. Raises OSError."""
    return _write(path, (json.dumps(value, indent=2).encode() + b"\n",), ())


def write_manifest(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Write what all the files of the folder must be; the last file of a state. Raises OSError."""
    facts = {name: {"sha256": file.sha256, "size": file.size} for name, file in files.items()}
    write_json_file(folder / MANIFEST_FILE, {"format": FORMAT, "format_version": FORMAT_VERSION, "files": facts})
    sync(folder)


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """The files of a state by name. Raises CheckpointError where they are not listed as they should be."""
    path = folder / MANIFEST_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["format"], data["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise CheckpointError(f"{path}: format version {data['format_version']}, this is {FORMAT_VERSION}")
        files = {name: FileFacts(**facts) for name, facts in data["files"].items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: incomplete, or written by another version of shapediff") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if PROGRESS_FILE not in files:
        raise CheckpointError(f"{path} lists no {PROGRESS_FILE}")
    return files


def check_file(path: Path, facts: FileFacts) -> None:
    """Raise CheckpointError unless the file is there, whole and as it was written."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if size != facts.size:
        raise CheckpointError(f"{path} holds {size} bytes of {facts.size}")
    if digest.hexdigest() != facts.sha256:
        raise CheckpointError(f"{path} is not what was written (sha256 differs)")


class TensorFiles:
    """The tensors of all ranks' files together, read where they are needed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [safetensors.safe_open(path, framework="pt") for path in paths]
        self._pieces: dict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for file in self._files:
            for name, start in json.loads(file.metadata()["starts"]).items():
                length = math.prod(file.get_slice(name).get_shape())
                self._pieces[name].append((start, start + length, file))

    def fill(self, target: Tensor, name: str, start: int) -> None:
        """Fill `target` (n,) with elements [start, start + n) of `name`. Raises CheckpointError where some are missing."""
        stop, filled = start + target.numel(), 0
        for first, last, file in self._pieces.get(name, ()):
            begin, end = max(start, first), min(stop, last)
            if begin < end:
                target[begin - start : end - start] = file.get_slice(name)[begin - first : end - first]
                filled += end - begin
        if filled != target.numel():
            raise CheckpointError(f"the state holds {filled} of the elements {start} to {stop} of {name}")

    def of_rank(self, rank: int, name: str) -> Tensor | None:
        """A tensor that is no piece, from the file of one rank; None where there is none."""
        if rank >= len(self._files) or name not in self._files[rank].keys():  # noqa: SIM118 (not a dict)
            return None
        return self._files[rank].get_tensor(name)


def sync(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, head: Sequence[bytes], body: Iterator[memoryview] | tuple[()]) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for parts in (head, body):
            for part in parts:
                stream.write(part)
                digest.update(part)
                size += len(part)
        stream.flush()
        os.fsync(stream.fileno())
    return FileFacts(digest.hexdigest(), size)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().numpy().data.cast("B")
