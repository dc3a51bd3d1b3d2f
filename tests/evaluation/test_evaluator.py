"""The evaluator and its classifier on balls and boxes, where the answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from shapediff.errors import DataError
from shapediff.evaluation import classifier
from shapediff.evaluation.cache import MatrixCache
from shapediff.evaluation.classifier import Judge, fingerprint, train, trained_classifier
from shapediff.evaluation.evaluator import OVERALL, Evaluation, Evaluator
from shapediff.evaluation.plots import plot
from shapediff.evaluation.report import table, to_json
from shapediff.evaluation.shapes import ShapeSet, draw, is_closed, num_parts

SIDE, CLASSES = 16, ("ball", "box")


def shapes(num: int, seed: int) -> ShapeSet:
    """`num` balls and `num` flat boxes of random sizes and places."""
    random = np.random.default_rng(seed)
    places = np.moveaxis(np.indices((SIDE,) * 3), 0, -1) + 0.5
    grids = []
    for i in range(2 * num):
        centre, radii = 8 + random.uniform(-2, 2, 3), random.uniform(2.5, 5, 3)
        away = np.abs(places - centre) / radii
        grids.append((np.square(away).sum(-1) < 1) if i < num else ((away * [1, 2.5, 1]).max(-1) < 1))
    return ShapeSet(np.stack(grids), np.repeat([0, 1], num))


@pytest.fixture(scope="module")
def judge() -> Judge:
    known = shapes(150, 0)
    return Judge(train(known.grids, known.labels, 2, num_seen=2400))


@pytest.fixture(scope="module")
def evaluator(judge: Judge) -> Evaluator:
    return Evaluator(
        shapes(40, 1), shapes(150, 0), CLASSES, judge, distances=("cd", "iou"), num_points=128, num_halves=20
    )


def test_fresh_shapes_pass_for_held_out_ones(evaluator: Evaluator) -> None:
    found = evaluator.evaluate(shapes(40, 2))
    assert found.counts == {"ball": 40, "box": 40}
    overall = found.generated[OVERALL]
    for metric in ("1-nna-cd", "1-nna-iou", "novelty"):
        assert abs(overall[metric].value - 0.5) < 3 * overall[metric].error, metric
    assert abs(overall["kid"].value) < 3 * overall["kid"].error
    assert overall["accuracy"].value > 0.8
    assert found.held_out[OVERALL]["accuracy"].value > 0.8
    assert overall["parts"].value == overall["closed"].value == 1
    # The mean of the classes, but for what is of all together.
    by_class = [found.generated[name] for name in CLASSES]
    assert overall["cov-cd"].value == pytest.approx(np.mean([s["cov-cd"].value for s in by_class]))
    assert overall["kid"].value == pytest.approx(np.mean([s["kid"].value for s in by_class]))


def test_copies_of_training_shapes_are_caught_by_novelty_alone(evaluator: Evaluator) -> None:
    copies = evaluator.evaluate(draw(evaluator.train, 80, seed=5)).generated[OVERALL]
    assert copies["novelty"].value == copies["to-train"].value == 0
    assert abs(copies["1-nna-cd"].value - 0.5) < 3 * copies["1-nna-cd"].error
    fresh = evaluator.evaluate(shapes(40, 2))
    assert fresh.train[OVERALL]["novelty"].value == 0
    assert fresh.generated[OVERALL]["to-train"].value > 0


def test_defects_move_what_they_should(evaluator: Evaluator) -> None:
    good = shapes(40, 2)
    whole = evaluator.evaluate(good).generated[OVERALL]

    def scores(grids: np.ndarray, labels: np.ndarray = good.labels) -> dict[str, float]:
        return {k: e.value for k, e in evaluator.evaluate(ShapeSet(grids, labels)).generated[OVERALL].items()}

    specks = good.grids.copy()
    specks[:, 0, 0, 0] = specks[:, -1, -1, -1] = True
    dirty = scores(specks)
    assert (dirty["parts"], dirty["one-part"]) == (3, 0)
    assert dirty["1-nna-cd"] > 0.75
    swapped = scores(good.grids, 1 - good.labels)
    assert swapped["accuracy"] == pytest.approx(1 - whole["accuracy"].value)
    small = scores(good.grids & np.roll(good.grids, 2, 1) & np.roll(good.grids, 2, 3))
    assert small["fid"] > 2 * whole["fid"].value
    assert small["1-nna-iou"] > whole["1-nna-iou"].high
    same = np.concatenate([good.grids[:1].repeat(40, 0), good.grids[40:41].repeat(40, 0)])
    collapsed = scores(same)
    assert collapsed["cov-cd"] == pytest.approx(1 / 40)
    assert collapsed["diversity"] == 0
    assert collapsed["recall"] < 0.1


def test_empty_shapes_count_as_bad_ones(evaluator: Evaluator) -> None:
    good = shapes(40, 2)
    grids = good.grids.copy()
    grids[::2] = False
    found = evaluator.evaluate(ShapeSet(grids, good.labels)).generated[OVERALL]
    assert found["closed"].value == found["one-part"].value == 0.5
    # The 20 of 40 lie upon each other, nearest to their own; the rest is even.
    assert found["1-nna-cd"].value == pytest.approx((20 + 60 / 2) / 80, abs=0.1)
    assert all(np.isfinite(e.value) for e in found.values())


def test_sets_are_compared_in_equal_numbers(evaluator: Evaluator) -> None:
    few = shapes(7, 3)
    assert evaluator.evaluate(few).counts == {"ball": 7, "box": 7}
    assert evaluator.evaluate(few.of_class(1)).counts == {"box": 7}
    with pytest.raises(DataError, match="4 shapes or more"):
        evaluator.evaluate(few.rows(np.array([0, 1, 2, 7, 8, 9])))


def test_pictures_are_compared_as_points_and_voxels_are(judge: Judge) -> None:
    """The held-out shapes themselves cover themselves at distance 0; others do not."""
    evaluator = Evaluator(shapes(5, 1), shapes(9, 0), CLASSES, judge, distances=("shade",), num_points=64, num_halves=5)
    same, other = (evaluator.evaluate(shapes(5, seed)).generated[OVERALL] for seed in (1, 2))
    assert same["mmd-shade"].value == 0 and same["cov-shade"].value == 1
    assert other["mmd-shade"].value > 0.05 and {"1-nna-shade", "cov-shade"} < set(other)


def test_a_second_run_is_read_from_the_cache(judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> Evaluation:
        cache = MatrixCache(tmp_path)
        return Evaluator(shapes(5, 1), shapes(9, 0), CLASSES, judge, num_points=64, num_halves=5, cache=cache).evaluate(
            shapes(5, 2)
        )

    first = evaluate()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 * 3 * 5  # classes, distances; real, generated, train, and real against both
    monkeypatch.setattr("shapediff.evaluation.distances._by_rows", None)
    assert evaluate() == first
    assert sorted(tmp_path.iterdir()) == files


def test_the_report_has_every_number_and_is_plain(evaluator: Evaluator, tmp_path: Path) -> None:
    found = evaluator.evaluate(shapes(5, 2))
    plain = json.loads(json.dumps(to_json(found, {"seed": 0})))
    cell = plain["scores"]["ball"]["1-nna-cd"]["samples"]
    assert cell["low"] < cell["value"] < cell["high"]
    assert set(plain["scores"]) == {OVERALL, *CLASSES}
    text = table(found)
    assert "| 1-NNA CD, % |" in text
    assert text.count("\n| ball | 5 |") == 1
    plot(found, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_classifier_is_trained_once_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = shapes(20, 0)
    one, other = (train(known.grids, known.labels, 2, num_seen=64).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    path = tmp_path / "judge.safetensors"
    first = trained_classifier(known.grids, known.labels, 2, path=path, num_seen=64)
    monkeypatch.setattr(classifier, "train", None)
    again = trained_classifier(known.grids, known.labels, 2, path=path)
    for found, expected in zip(again.judge(known.grids), first.judge(known.grids), strict=True):
        np.testing.assert_array_equal(found, expected)
    # Features are in units of the training set.
    features, _ = again.judge(known.grids)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-3)


def test_the_fingerprint_is_of_shapes_and_labels() -> None:
    known = shapes(3, 0)
    changed = known.grids.copy()
    changed[0, 0, 0, 0] ^= True
    marks = {
        fingerprint(known.grids, known.labels),
        fingerprint(changed, known.labels),
        fingerprint(known.grids, known.labels[::-1]),
    }
    assert len(marks) == 3
    assert fingerprint(known.grids.copy(), known.labels.copy()) in marks


def test_parts_touch_by_faces_and_closedness_is_the_meshes_own() -> None:
    grid = np.zeros((1, 8, 8, 8), bool)
    grid[0, 2, 2, 2] = grid[0, 3, 3, 2] = grid[0, 3, 4, 2] = True
    assert num_parts(grid).tolist() == [2]
    label = np.zeros(1, np.int64)
    assert is_closed(ShapeSet(grid, label)).tolist() == [True]
    assert is_closed(ShapeSet(grid, label, np.array([False]))).tolist() == [False]


def test_fewer_are_the_first_of_more() -> None:
    many = shapes(10, 0)
    np.testing.assert_array_equal(draw(many, 4, seed=1).grids, draw(many, 9, seed=1).grids[:4])
