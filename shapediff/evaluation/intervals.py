"""How sure a metric is: intervals from half-samples without replacement.

The bootstrap would draw a shape twice, and a nearest neighbour at distance 0 with it: 1-NNA, COV and recall of such draws say
nothing of real ones. Half-samples without replacement are the delete-d jackknife with d = n / 2 (Shao and Wu 1989), consistent
for statistics that are not smooth; the spread over them is then the standard error of the whole, without a factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

NUM_HALVES = 100
NORMAL_95 = 1.96

Rows = Int64[np.ndarray, " n"]
Statistic = Callable[[Rows, Rows], float]
"""A metric of the real shapes in some rows and the generated ones in others."""


@dataclass(frozen=True)
class Estimate:
    """A metric, its standard error, and from them an interval that holds the truth in 95 of 100 cases."""

    value: float
    error: float

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.value - NORMAL_95 * self.error

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.value + NORMAL_95 * self.error


@dataclass(frozen=True)
class Draws:
    """Rows of the real shapes and of the generated ones: all of them, and halves."""

    whole: tuple[Rows, Rows]
    halves: list[tuple[Rows, Rows]]


def draw_halves(
    real_labels: Int64[np.ndarray, " n"],
    generated_labels: Int64[np.ndarray, " m"],
    *,
    seed: int = 0,
    num_halves: int = NUM_HALVES,
) -> Draws:
    """Halves drawn class by class, as the sets were."""
    draw = np.random.default_rng(seed)
    sets = [
        [np.flatnonzero(labels == label) for label in np.unique(labels)] for labels in (real_labels, generated_labels)
    ]
    halves = [(_half(sets[0], draw), _half(sets[1], draw)) for _ in range(num_halves)]
    return Draws((np.arange(len(real_labels)), np.arange(len(generated_labels))), halves)


def estimate(statistic: Statistic, draws: Draws) -> Estimate:
    """The statistic of all rows, with its error."""
    return Estimate(statistic(*draws.whole), float(np.std([statistic(*half) for half in draws.halves], ddof=1)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates, such as those of classes."""
    errors = np.array([e.error for e in estimates])
    return Estimate(float(np.mean([e.value for e in estimates])), float(np.sqrt((errors**2).sum()) / len(errors)))


def _half(classes: list[Rows], draw: np.random.Generator) -> Rows:
    """Half of the rows of each class, rounded up."""
    return np.concatenate([draw.permutation(rows)[: (len(rows) + 1) // 2] for rows in classes])
