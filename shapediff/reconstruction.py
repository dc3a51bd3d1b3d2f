"""How much of held-out shapes an autoencoder gives back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Split
from shapediff.evaluation.evaluator import OVERALL
from shapediff.evaluation.intervals import Estimate
from shapediff.grid.morton import morton_to_dense
from shapediff.pipeline import ShapePipeline

BATCH_SIZE = 32


def reconstruction_iou(
    pipeline: ShapePipeline, data: Path, *, splits: Sequence[Split], classes: Sequence[str]
) -> dict[str, Estimate]:
    """The mean IoU of shapes of `splits` with what the pipeline's autoencoder makes of them, by class and OVERALL.

    Nothing where it has none, or where the data are of another field.
    """
    if not pipeline.has_autoencoder:
        return {}
    by_class: dict[str, list[Float64[np.ndarray, " n"]]] = {name: [] for name in classes}
    for split in splits:
        dataset = ShapeDataset(data, split=split)
        if dataset.field != pipeline.config.field:
            return {}
        for name in classes:
            rows = np.flatnonzero(np.asarray(dataset.labels) == dataset.classes.index(name))
            for part in np.split(rows, range(BATCH_SIZE, len(rows), BATCH_SIZE)):
                by_class[name].append(_iou(pipeline, dataset, part))
    values = {name: np.concatenate(parts) for name, parts in by_class.items()}
    values[OVERALL] = np.concatenate(list(values.values()))
    return {name: _mean(found) for name, found in values.items() if len(found) > 1}


def _iou(pipeline: ShapePipeline, dataset: ShapeDataset, rows: np.ndarray) -> Float64[np.ndarray, " n"]:
    if not len(rows):
        return np.zeros(0)
    voxels = morton_to_dense(dataset.batch(rows)["voxels"])
    again, given = ((signal > 0).flatten(1) for signal in (pipeline.reconstruct(voxels), voxels))
    return ((again & given).sum(1) / (again | given).sum(1).clamp(min=1)).double().numpy()


def _mean(values: Float64[np.ndarray, " n"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))
