"""What a model says of held-out shapes themselves: how much an autoencoder gives back, how likely the shapes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Split
from shapediff.evaluation.evaluator import OVERALL
from shapediff.evaluation.intervals import Estimate
from shapediff.grid.morton import morton_to_dense
from shapediff.methods.shape_vae import occupancy_iou
from shapediff.pipeline import ShapePipeline

BATCH_SIZE = 32

Score = Callable[[Tensor, str], Tensor]
"""Of signals (b, R, R, R) of one class, (b,)."""


def held_out_scores(
    pipeline: ShapePipeline, data: Path, *, splits: Sequence[Split], classes: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    """By metric, the mean over the shapes of `splits`, by class and OVERALL: "reconstruction", the IoU with what an autoencoder
    makes of them, and "bits", -log2 p(x | class) a voxel.

    Only what the model can say, and nothing where the data are of another field.
    """

    def iou(voxels: Tensor, name: str) -> Tensor:
        return occupancy_iou(pipeline.reconstruct(voxels).flatten(1), voxels.flatten(1))

    def bits(voxels: Tensor, name: str) -> Tensor:
        return pipeline.bits_per_voxel(voxels, [name] * len(voxels))

    datasets = [ShapeDataset(data, split=split) for split in splits]
    if any(dataset.field != pipeline.config.field for dataset in datasets):
        return {}
    scores: dict[str, Score] = {"reconstruction": iou} if pipeline.has_autoencoder else {}
    if pipeline.has_likelihood and pipeline.config.field == "occupancy":
        scores["bits"] = bits
    return {metric: _by_class(score, datasets, classes) for metric, score in scores.items()}


def _by_class(score: Score, datasets: Sequence[ShapeDataset], classes: Sequence[str]) -> dict[str, Estimate]:
    values: dict[str, Float64[np.ndarray, " n"]] = {}
    for name in classes:
        found = [np.zeros(0)]
        for dataset in datasets:
            rows = np.flatnonzero(np.asarray(dataset.labels) == dataset.classes.index(name))
            for part in np.split(rows, range(BATCH_SIZE, len(rows), BATCH_SIZE)):
                if len(part):
                    found.append(score(morton_to_dense(dataset.batch(part)["voxels"]), name).double().numpy())
        values[name] = np.concatenate(found)
    values[OVERALL] = np.concatenate(list(values.values()))
    return {name: _mean(found) for name, found in values.items() if len(found) > 1}


def _mean(values: Float64[np.ndarray, " n"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))
