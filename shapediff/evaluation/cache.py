"""Matrices of distances kept on disk by what they were computed from, so that a run that was stopped goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from shapediff.files import replaced_file

VERSION = 1
"""Counted up with any change of a distance or of the points it is measured on."""


class MatrixCache:
    """`get` computes a matrix once; None as a folder keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, name: str, inputs: tuple[np.ndarray | None, ...], compute: Callable[[], np.ndarray]) -> np.ndarray:
        """`compute()`, or what it gave for the same name and inputs before."""
        if self._folder is None:
            return compute()
        path = self._folder / f"{name}-{_digest(name, inputs)}.npy"
        if path.exists():
            return np.load(path, allow_pickle=False)
        matrix = compute()
        with replaced_file(path) as partial:
            np.save(partial, matrix, allow_pickle=False)
        return matrix


def _digest(name: str, inputs: tuple[np.ndarray | None, ...]) -> str:
    digest = hashlib.sha256(f"{VERSION} {name}".encode())
    for array in inputs:
        digest.update(b"none" if array is None else f"{array.dtype} {array.shape}".encode())
        if array is not None:
            digest.update((np.packbits(array) if array.dtype == bool else np.ascontiguousarray(array)).tobytes())
    return digest.hexdigest()[:24]
