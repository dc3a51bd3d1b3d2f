"""Every metric of a set of generated shapes, class by class and overall, beside what real shapes get."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from shapediff.errors import DataError
from shapediff.evaluation import generative
from shapediff.evaluation.cache import MatrixCache
from shapediff.evaluation.classifier import Judge
from shapediff.evaluation.distances import DISTANCES, Matrix, euclidean
from shapediff.evaluation.frechet import frechet_distance, kernel_distance
from shapediff.evaluation.intervals import NUM_HALVES, Estimate, Rows, Statistic, draw_halves, estimate, mean_of
from shapediff.evaluation.pictures import shaded_pictures
from shapediff.evaluation.points import NUM_POINTS, surface_points
from shapediff.evaluation.shapes import ShapeSet, draw, is_closed, join, num_parts

OVERALL = "overall"
POOLED = ("fid", "precision", "recall")
"""Overall, these are of all classes together; every other metric is the mean of the classes.

Not KID: sets of equal numbers a class have fewer pairs of one class within than between them, which makes it negative.
"""

logger = logging.getLogger(__name__)

MIN_SHAPES = 4
"""Of a class: half of them still have a neighbour each."""

OnProgress = Callable[[str], object]
Scores = dict[str, dict[str, Estimate]]
"""By class, and OVERALL, then by metric."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of the generated shapes; of as many training shapes in their place; and of the held-out shapes alone.

    `counts` has the shapes of each class that were compared.
    """

    generated: Scores
    train: Scores
    held_out: Scores
    counts: dict[str, int]


def with_enough(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The classes with MIN_SHAPES or more of each kind, given how many of each there are; says which others are left out.

    Raises DataError where there are none.
    """
    enough = [name for name, found in counts.items() if min(found.values()) >= MIN_SHAPES]
    too_few = [
        f"{name} has {', '.join(f'{num} {kind}' for kind, num in found.items())}"
        for name, found in counts.items()
        if name not in enough
    ]
    if not enough:
        raise DataError(
            f"no class has {MIN_SHAPES} shapes or more of each kind: {'; '.join(too_few[:8]) or 'there are no samples'}"
        )
    for line in too_few:
        logger.warning("left out, fewer than %d of a kind: %s", MIN_SHAPES, line)
    return enough


@dataclass(frozen=True)
class Evaluator:
    """Compares sets of shapes with held-out ones.

    `nearest_train` gives the distances (n,) of shapes of a class from their nearest training shape.
    """

    real: ShapeSet
    train: ShapeSet
    classes: Sequence[str]
    judge: Judge
    distances: Sequence[str] = ("cd", "swd", "iou")
    num_points: int = NUM_POINTS
    seed: int = 0
    num_halves: int = NUM_HALVES
    cache: MatrixCache = field(default_factory=lambda: MatrixCache(None))
    on_progress: OnProgress = lambda text: None

    def evaluate(self, generated: ShapeSet) -> Evaluation:
        """Score `generated`. Raises DataError where no class has MIN_SHAPES shapes of each set."""
        real, generated, train = self._matched(generated)
        labels = [int(label) for label in np.unique(real.labels)]
        one, other, sure = (self._measured(s, labels) for s in (real, generated, train))
        return Evaluation(
            generated=self._compare(one, other, labels, "samples"),
            train=self._compare(one, sure, labels, "training shapes"),
            held_out=self._alone(one, labels),
            counts={self.classes[label]: int((real.labels == label).sum()) for label in labels},
        )

    def _matched(self, generated: ShapeSet) -> tuple[ShapeSet, ShapeSet, ShapeSet]:
        """Equal numbers a class of all three sets, since 1-NNA, COV and FID depend on them."""
        kinds = {"samples": generated, "held out": self.real, "to train on": self.train}
        labels = [int(label) for label in np.unique(generated.labels)]
        parts = {self.classes[label]: {kind: s.of_class(label) for kind, s in kinds.items()} for label in labels}
        chosen: list[tuple[ShapeSet, ...]] = []
        for name in with_enough({name: {kind: len(s) for kind, s in of.items()} for name, of in parts.items()}):
            here = (parts[name]["held out"], parts[name]["samples"], parts[name]["to train on"])
            chosen.append(tuple(draw(part, min(map(len, here)), seed=self.seed) for part in here))
        real, samples, train = (join(sets) for sets in zip(*chosen, strict=True))
        return real, samples, train

    def _measured(self, shapes: ShapeSet, labels: list[int]) -> _Measured:
        self.on_progress("surfaces and features")
        points = surface_points(shapes.grids, num_points=self.num_points)
        features, predicted = self.judge.judge(shapes.grids)
        is_pictured = any(DISTANCES[key].of == "pictures" for key in self.distances)
        to_train = np.concatenate([self._nearest_train(shapes.of_class(label), label) for label in labels])
        measured = {"points": points, "grids": shapes.grids}
        if is_pictured:  # some forty milliseconds a shape
            measured["pictures"] = shaded_pictures(shapes.grids)
        return _Measured(shapes, measured, features.astype(np.float64), predicted == shapes.labels, to_train)

    def _nearest_train(self, shapes: ShapeSet, label: int) -> Float64[np.ndarray, " n"]:
        return DISTANCES["iou"].measure(shapes.grids, self.train.of_class(label).grids, None).min(1)

    def _compare(self, real: _Measured, other: _Measured, labels: list[int], title: str) -> Scores:
        scores: Scores = {}
        for label in labels:
            name = self.classes[label]
            one, two = real.of_class(label), other.of_class(label)
            scores[name] = {}
            for key in self.distances:
                self.on_progress(f"{title}: {key}, {name}")
                scores[name] |= self._by_distance(key, one, two)
            self.on_progress(f"{title}: features, {name}")
            scores[name] |= self._estimates(_of_pair(one, two) | _of_features(one, two), one, two)
        pooled = self._estimates(_of_features(real, other), real, other)
        scores[OVERALL] = _overall(scores, pooled)
        return scores

    def _by_distance(self, key: str, one: _Measured, two: _Measured) -> dict[str, Estimate]:
        rr, gg, rg = self._matrix(key, one, None), self._matrix(key, two, None), self._matrix(key, one, two)

        def cut(r: Rows, g: Rows) -> tuple[Matrix, Matrix, Matrix]:
            return rr[np.ix_(r, r)], gg[np.ix_(g, g)], rg[np.ix_(r, g)]

        statistics: dict[str, Statistic] = {
            f"1-nna-{key}": lambda r, g: generative.nearest_neighbour_accuracy(*cut(r, g)),
            f"cov-{key}": lambda r, g: generative.coverage(rg[np.ix_(r, g)]),
            f"mmd-{key}": lambda r, g: generative.minimum_matching_distance(rg[np.ix_(r, g)]),
        }
        if key == "iou":
            statistics["diversity"] = _diversity_in(gg)
        return self._estimates(statistics, one, two)

    def _matrix(self, key: str, one: _Measured, two: _Measured | None) -> Matrix:
        distance = DISTANCES[key]
        a, b = one.measured[distance.of], None if two is None else two.measured[distance.of]
        return self.cache.get(key, (a, b), lambda: distance.measure(a, b, None))

    def _alone(self, real: _Measured, labels: list[int]) -> Scores:
        """What can be said of the held-out shapes without another set."""
        scores: Scores = {}
        for label in labels:
            one = real.of_class(label)
            rr = self._matrix("iou", one, None)
            statistics = {name: s for name, s in _of_pair(one, one).items() if name != "jsd"}
            statistics["diversity"] = _diversity_in(rr)
            scores[self.classes[label]] = self._estimates(statistics, one, one)
        scores[OVERALL] = _overall(scores, {})
        return scores

    def _estimates(self, statistics: dict[str, Statistic], one: _Measured, two: _Measured) -> dict[str, Estimate]:
        draws = draw_halves(one.labels, two.labels, seed=self.seed, num_halves=self.num_halves)
        return {name: estimate(statistic, draws) for name, statistic in statistics.items()}


@dataclass(frozen=True)
class _Measured:
    """Shapes with what distances are `measured` on, features, whether it passes for its class, distance from training shapes."""

    shapes: ShapeSet
    measured: dict[str, np.ndarray]
    features: Float64[np.ndarray, "n d"]
    is_recognised: np.ndarray
    to_train: Float64[np.ndarray, " n"]

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        return self.shapes.labels

    @cached_property
    def facts(self) -> tuple[np.ndarray, np.ndarray]:
        """(parts (n,), whether closed (n,))."""
        return num_parts(self.shapes.grids), is_closed(self.shapes)

    def of_class(self, label: int) -> _Measured:
        rows = np.flatnonzero(self.labels == label)
        return _Measured(
            self.shapes.rows(rows),
            {name: values[rows] for name, values in self.measured.items()},
            self.features[rows],
            self.is_recognised[rows],
            self.to_train[rows],
        )


def _of_pair(real: _Measured, other: _Measured) -> dict[str, Statistic]:
    """Metrics that need no matrix of distances."""
    p, q = (generative.point_histograms(s.measured["points"]) for s in (real, other))
    touched = p.any(0) | q.any(0)
    p, q = p[:, touched], q[:, touched]
    parts, closed = other.facts

    def mean(values: np.ndarray) -> Statistic:
        return lambda r, g: float(values[g].mean())

    return {
        "jsd": lambda r, g: generative.jensen_shannon(p[r].mean(0), q[g].mean(0)),
        "accuracy": mean(other.is_recognised),
        "novelty": lambda r, g: generative.novelty(real.to_train[r], other.to_train[g]),
        "to-train": mean(other.to_train),
        "parts": mean(parts),
        "one-part": mean(parts == 1),
        "closed": mean(closed),
    }


def _of_features(real: _Measured, other: _Measured) -> dict[str, Statistic]:
    """Metrics in the classifier's features."""
    rr, gg, rg = euclidean(real.features), euclidean(other.features), euclidean(real.features, other.features)

    def both(r: Rows, g: Rows) -> generative.PrecisionRecall:
        return generative.precision_recall(rr[np.ix_(r, r)], gg[np.ix_(g, g)], rg[np.ix_(r, g)])

    return {
        "fid": lambda r, g: frechet_distance(real.features[r], other.features[g]),
        "kid": lambda r, g: kernel_distance(real.features[r], other.features[g]),
        "precision": lambda r, g: both(r, g).precision,
        "recall": lambda r, g: both(r, g).recall,
    }


def _diversity_in(matrix: Matrix) -> Statistic:
    return lambda r, g: generative.diversity(matrix[np.ix_(g, g)])


def _overall(scores: Scores, pooled: dict[str, Estimate]) -> dict[str, Estimate]:
    names = next(iter(scores.values()))
    means: dict[str, Any] = {name: mean_of([s[name] for s in scores.values()]) for name in names}
    return means | {name: pooled[name] for name in POOLED if name in pooled}
