"""Metrics between sets: known answers, symmetry, and the way each moves when a distribution changes in a known way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import mannwhitneyu

from shapediff.evaluation.distances import euclidean
from shapediff.evaluation.frechet import frechet_distance, gaussian_distance, kernel_distance
from shapediff.evaluation.generative import (
    coverage,
    diversity,
    jensen_shannon,
    minimum_matching_distance,
    nearest_neighbour_accuracy,
    novelty,
    point_histograms,
    precision_recall,
)
from shapediff.evaluation.intervals import Estimate, draw_halves, estimate, mean_of


def cloud(num: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, 4)) * scale + shift


def scores(real: np.ndarray, generated: np.ndarray) -> dict[str, float]:
    rr, gg, rg = euclidean(real), euclidean(generated), euclidean(real, generated)
    both = precision_recall(rr, gg, rg)
    return {
        "1-nna": nearest_neighbour_accuracy(rr, gg, rg),
        "cov": coverage(rg),
        "mmd": minimum_matching_distance(rg),
        "precision": both.precision,
        "recall": both.recall,
        "fid": frechet_distance(real, generated),
        "kid": kernel_distance(real, generated),
        "diversity": diversity(gg),
    }


def test_by_hand() -> None:
    real, generated = np.array([[0.0], [1.0], [10.0]]), np.array([[0.4], [0.5], [11.0]])
    rr, gg, rg = euclidean(real), euclidean(generated), euclidean(real, generated)
    # Nearest others: 0 -> 0.4 (not own), 1 -> 0.5 (not), 10 -> 11 (not); 0.4 -> 0.5 own, 0.5 -> 0.4 own, 11 -> 10 not.
    assert nearest_neighbour_accuracy(rr, gg, rg) == pytest.approx(2 / 6)
    assert coverage(rg) == pytest.approx(2 / 3)  # 0.4 -> 0; 0.5 is as near to 0 as to 1, the first counts; 11 -> 10
    assert minimum_matching_distance(rg) == pytest.approx((0.4 + 0.5 + 1.0) / 3)
    both = precision_recall(rr, gg, rg, num_neighbours=1)  # radii 1, 1, 9 and 0.1, 0.1, 10.5
    assert both.precision == 1
    assert both.recall == pytest.approx(2 / 3)  # 1 and 10 lie within 10.5 of 11, 0 does not


def test_one_nna_of_two_halves_is_a_half_within_its_interval() -> None:
    real, other = cloud(200, 0), cloud(200, 1)
    rr, gg, rg = euclidean(real), euclidean(other), euclidean(real, other)
    labels = np.zeros(200, np.int64)
    found = estimate(
        lambda r, g: nearest_neighbour_accuracy(rr[np.ix_(r, r)], gg[np.ix_(g, g)], rg[np.ix_(r, g)]),
        draw_halves(labels, labels),
    )
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.25


def test_copies_and_strangers() -> None:
    real = cloud(50, 0)
    copies, strangers = scores(real, real + 1e-6), scores(real, cloud(50, 1, shift=100))
    assert copies["1-nna"] == 0
    assert copies["cov"] == copies["precision"] == copies["recall"] == 1
    assert copies["fid"] == pytest.approx(0, abs=1e-6)
    assert strangers["1-nna"] == 1
    assert strangers["precision"] == strangers["recall"] == 0


def test_a_tie_counts_half() -> None:
    one = np.zeros((4, 2))
    assert nearest_neighbour_accuracy(euclidean(one), euclidean(one), euclidean(one, one)) == 0.5


def test_a_shift_moves_every_metric() -> None:
    real = cloud(300, 0)
    found = [scores(real, cloud(300, 1, shift=shift)) for shift in (0.0, 0.5, 1.0, 2.0)]
    for rising in ("1-nna", "mmd", "fid", "kid"):
        values = [s[rising] for s in found]
        assert values == sorted(values), rising
    for falling in ("cov", "precision", "recall"):
        values = [s[falling] for s in found]
        assert values == sorted(values, reverse=True), falling
        assert values[-1] < 0.7 * values[0], falling


def test_mode_collapse_costs_coverage_and_recall_and_not_precision() -> None:
    real, whole = cloud(300, 0), scores(cloud(300, 0), cloud(300, 1))
    collapsed = scores(real, cloud(300, 1, scale=0.2))
    assert collapsed["precision"] > 0.95
    assert collapsed["recall"] < 0.3 * whole["recall"]
    assert collapsed["cov"] < 0.7 * whole["cov"]
    assert collapsed["diversity"] == pytest.approx(0.2 * whole["diversity"], rel=0.1)
    assert collapsed["fid"] > 5 * whole["fid"]


def test_noise_costs_precision_and_not_recall() -> None:
    real, whole = cloud(300, 0), scores(cloud(300, 0), cloud(300, 1))
    noisy = scores(real, cloud(300, 1, scale=3.0))
    assert noisy["precision"] < 0.5 * whole["precision"]
    assert noisy["recall"] > whole["recall"]


def test_swapping_the_sets() -> None:
    """1-NNA, FID, KID and JSD are symmetric; precision and recall trade places; COV and MMD are of the real shapes."""
    real, generated = cloud(60, 0), cloud(40, 1, scale=0.4)
    one, other = scores(real, generated), scores(generated, real)
    for name in ("1-nna", "fid", "kid"):
        assert one[name] == pytest.approx(other[name], rel=1e-9)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["mmd"] > other["mmd"]
    rg = euclidean(real, generated)
    assert coverage(rg) != coverage(rg.T)
    assert coverage(rg) <= 40 / 60  # 40 shapes can be nearest to 40 real ones at most


def test_frechet_distance_of_gaussians() -> None:
    """Of N(m, s^2 I): |m_a - m_b|^2 + d (s_a - s_b)^2; of commuting covariances the sum over axes."""
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    shift = np.array([1.0, 0.0, 2.0])
    assert gaussian_distance(np.zeros(3), a, shift, b) == pytest.approx(5 + 1 + 0 + 4)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turned = gaussian_distance(np.zeros(3), turn @ a @ turn.T, turn @ shift, turn @ b @ turn.T)
    assert turned == pytest.approx(10)
    many = frechet_distance(cloud(200_000, 0), cloud(200_000, 1, shift=0.5, scale=2.0))
    assert many == pytest.approx(4 * 0.25 + 4 * 1.0, rel=0.02)


def test_kernel_distance_is_unbiased() -> None:
    found = [kernel_distance(cloud(20, 2 * i), cloud(20, 2 * i + 1)) for i in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert min(found) < 0


def test_novelty_is_the_mann_whitney_statistic_and_catches_copies() -> None:
    held_out, generated = np.round(cloud(50, 0)[:, 0], 1), np.round(cloud(70, 1, shift=0.3)[:, 0], 1)
    u = mannwhitneyu(generated, held_out).statistic
    assert novelty(held_out, generated) == pytest.approx(u / (50 * 70))
    assert novelty(held_out, held_out) == 0.5
    real, train = cloud(100, 2), cloud(400, 3)
    copies = train[:100] + 1e-3
    assert novelty(euclidean(real, train).min(1), euclidean(copies, train).min(1)) == 0
    assert novelty(euclidean(real, train).min(1), euclidean(cloud(100, 4), train).min(1)) == pytest.approx(
        0.5, abs=0.15
    )


def test_jensen_shannon_is_that_of_scipy_and_sees_a_shift() -> None:
    draw = np.random.default_rng(0)
    p, q = draw.dirichlet(np.ones(30)), draw.dirichlet(np.ones(30))
    p[:5] = 0
    p /= p.sum()
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    points = (draw.random((4, 3, 500)) - 0.5) * 0.3
    rows = [point_histograms(points + shift).mean(0) for shift in (0.0, 0.1, 0.3)]
    assert rows[0].sum() == pytest.approx(1)
    assert 0 == jensen_shannon(rows[0], rows[0]) < jensen_shannon(rows[0], rows[1]) < jensen_shannon(rows[0], rows[2])
    assert jensen_shannon(rows[0], point_histograms(points - 0.4).mean(0)) <= 1


def test_the_error_is_that_of_the_mean() -> None:
    """Of a mean the half-sampling error is s / sqrt(n), whatever the values."""
    values = np.random.default_rng(0).exponential(size=400)
    labels = np.zeros(400, np.int64)
    found = estimate(lambda r, g: float(values[g].mean()), draw_halves(labels, labels, num_halves=400))
    assert found.value == values.mean()
    assert found.error == pytest.approx(values.std(ddof=1) / 20, rel=0.12)


def test_the_error_of_one_nna_is_its_spread_over_fresh_sets() -> None:
    def one(seed: int) -> Estimate:
        real, other = cloud(60, 2 * seed), cloud(60, 2 * seed + 1, shift=0.4)
        rr, gg, rg = euclidean(real), euclidean(other), euclidean(real, other)
        labels = np.zeros(60, np.int64)
        return estimate(
            lambda r, g: nearest_neighbour_accuracy(rr[np.ix_(r, r)], gg[np.ix_(g, g)], rg[np.ix_(r, g)]),
            draw_halves(labels, labels, num_halves=40),
        )

    found = [one(seed) for seed in range(60)]
    spread = np.std([e.value for e in found], ddof=1)
    assert 0.75 * spread < np.mean([e.error for e in found]) < 1.6 * spread


def test_the_mean_of_classes() -> None:
    found = mean_of([Estimate(1.0, 0.3), Estimate(3.0, 0.4)])
    assert (found.value, found.error) == (2.0, pytest.approx(0.25))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.25)
