"""What a model says of held-out shapes themselves: how much an autoencoder gives back, how likely the shapes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from shapediff.checkpoint import grid_settings
from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Split
from shapediff.evaluation.evaluator import OVERALL
from shapediff.evaluation.intervals import Estimate, mean_of
from shapediff.grid.morton import morton_to_dense
from shapediff.methods.shape_vae import occupancy_iou
from shapediff.pipeline import ShapePipeline

BATCH_SIZE = 32

Score = Callable[[Tensor, str, Sequence[int]], Tensor]
"""Of signals (b, R, R, R) of one class, with the number of each among all that are measured: (b,)."""


def held_out_scores(
    pipeline: ShapePipeline, data: Path, *, splits: Sequence[Split], classes: Sequence[str], seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """By metric, the mean over the shapes of `splits`, by class, and OVERALL the mean of the classes: "reconstruction", the IoU
    with what an autoencoder makes of them, and "bits", -log2 p(x | class) a voxel.

    Only what the model can say, and nothing where its signals are others than those of the data.
    """

    def iou(voxels: Tensor, name: str, numbers: Sequence[int]) -> Tensor:
        return occupancy_iou(pipeline.reconstruct(voxels).flatten(1), voxels.flatten(1))

    def bits(voxels: Tensor, name: str, numbers: Sequence[int]) -> Tensor:
        return pipeline.bits_per_voxel(voxels, [name] * len(voxels), seed=seed, numbers=numbers)

    datasets = [ShapeDataset(data, split=split) for split in splits]
    config = pipeline.config
    if any(getattr(d, name) != getattr(config, name) for d in datasets for name in grid_settings(config.field)):
        return {}
    scores: dict[str, Score] = {"reconstruction": iou} if pipeline.has_autoencoder else {}
    if pipeline.has_likelihood and config.field == "occupancy":
        scores["bits"] = bits
    return {metric: _by_class(score, datasets, classes) for metric, score in scores.items()}


def _by_class(score: Score, datasets: Sequence[ShapeDataset], classes: Sequence[str]) -> dict[str, Estimate]:
    estimates: dict[str, Estimate] = {}
    number = 0
    for name in classes:
        values = [np.zeros(0)]
        for dataset in datasets:
            rows = np.flatnonzero(np.asarray(dataset.labels) == dataset.classes.index(name))
            for part in np.array_split(rows, range(BATCH_SIZE, len(rows), BATCH_SIZE)):
                if len(part):
                    voxels = morton_to_dense(dataset.batch(part)["voxels"])
                    values.append(score(voxels, name, range(number, number + len(part))).double().numpy())
                    number += len(part)
        found = np.concatenate(values)
        if len(found) > 1:
            estimates[name] = _mean(found)
    return estimates | ({OVERALL: mean_of(list(estimates.values()))} if estimates else {})


def _mean(values: Float64[np.ndarray, " n"]) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5))
