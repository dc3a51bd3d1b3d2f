"""The error by timestep and by class against a slow reference, what else a method reports, and how it reaches the files."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shapediff.engine import curves as curves_module
from shapediff.engine.config import LoopConfig
from shapediff.engine.curves import ErrorCurves, sums_and_counts
from shapediff.engine.means import MetricMeans
from shapediff.engine.report import METRICS_FILE, Reporter
from shapediff.methods import LossOutput

CLASSES = ("chair", "table", "椅子")
NUM_TIMESTEPS = 100


def _outputs(num: int, *, seed: int = 0) -> list[LossOutput]:
    generator = torch.Generator().manual_seed(seed)
    draws = [
        (
            torch.rand(5, generator=generator),
            torch.randint(NUM_TIMESTEPS, (5,), generator=generator),
            torch.randint(2, (5,), generator=generator),
        )
        for _ in range(num)
    ]
    return [LossOutput(error.mean(), error, error, t, label) for error, t, label in draws]


def _reference(
    outputs: list[LossOutput], buckets: int, num_timesteps: int
) -> tuple[list[list[float]], list[list[float]]]:
    by_timestep: list[list[float]] = [[] for _ in range(buckets)]
    by_class: list[list[float]] = [[] for _ in CLASSES]
    for output in outputs:
        for error, t, label in zip(output.error.tolist(), output.t.tolist(), output.label.tolist(), strict=True):
            by_timestep[t * buckets // num_timesteps].append(error)
            by_class[label].append(error)
    return by_timestep, by_class


def _means(groups: list[list[float]]) -> list[object]:
    # Six digits are written.
    return [pytest.approx(sum(group) / len(group), rel=1e-5) if group else None for group in groups]


@pytest.mark.parametrize("max_waiting", [1, 7, 1000])
@pytest.mark.parametrize(("num_timesteps", "buckets"), [(100, 10), (104, 10), (4, 4)])
def test_means_are_those_of_a_loop(
    num_timesteps: int, buckets: int, max_waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves_module, "MAX_WAITING", max_waiting)
    found = ErrorCurves(num_timesteps, CLASSES)
    for window in range(2):  # the second knows nothing of the first
        outputs = _outputs(20, seed=window)
        if num_timesteps < NUM_TIMESTEPS:
            outputs = [LossOutput(o.loss, o.per_sample, o.error, o.t % num_timesteps, o.label) for o in outputs]
        for output in outputs:
            found.add(output)
        by_timestep, by_class = _reference(outputs, buckets, num_timesteps)
        taken = found.take()
        assert taken["error_by_timestep"] == _means(by_timestep)
        assert taken["error_by_class"] == dict(zip(CLASSES, _means(by_class), strict=True))
        assert taken["error_by_class"]["椅子"] is None  # type: ignore[call-overload]


def test_what_waits_keeps_no_graph_alive() -> None:
    weight = torch.ones((), requires_grad=True)
    loss = weight * 2
    error, t, label = torch.ones(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    found, output = ErrorCurves(NUM_TIMESTEPS, CLASSES), LossOutput(loss, error, error, t, label)
    found.add(output)
    alive = weakref.ref(loss)
    del loss, output
    assert alive() is None


def test_sums_and_counts_add_up_over_parts() -> None:
    """As over ranks: the rows of two halves are those of the whole."""
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(4, (50,), generator=torch.Generator().manual_seed(1))
    parts = sums_and_counts(values[:20], ids[:20], 6) + sums_and_counts(values[20:], ids[20:], 6)
    whole = sums_and_counts(values, ids, 6)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0)
    assert whole[:, 1].tolist() == torch.bincount(ids, minlength=6).tolist()


def test_curves_reach_the_lines_and_tensorboard(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, LoopConfig(steps=10), first_step=0)
    reporter.metrics(
        3, {"loss": 0.5, "error_by_timestep": [0.25, None], "error_by_class": {"chair": 0.75, "椅子": None}}
    )
    reporter.close()
    (line,) = (tmp_path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "step": 3, "loss": 0.5, "error_by_timestep": [0.25, None], "error_by_class": {"chair": 0.75, "椅子": None}
    }  # fmt: skip
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: board.Scalars(tag)[0].value for tag in board.Tags()["scalars"]}
    assert found == {"loss": 0.5, "error_by_timestep/0": 0.25, "error_by_class/chair": 0.75}


def test_tensorboard_keeps_the_step_that_was_saved_and_drops_those_after_it(tmp_path: Path) -> None:
    for first_step, steps in ((0, (2, 4)), (2, (4, 6)), (0, (1,))):  # killed before the first state, the last time
        reporter = Reporter(tmp_path, LoopConfig(steps=10), first_step=first_step)
        for step in steps:
            reporter.metrics(step, {"loss": float(step + first_step)})
        reporter.close()
        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        found = [(event.step, event.value) for event in board.Scalars("loss")]
        assert found == {(2, 4): [(2, 2.0), (4, 4.0)], (4, 6): [(2, 2.0), (4, 6.0), (6, 8.0)], (1,): [(1, 1.0)]}[steps]


def test_a_line_cut_short_at_an_inner_brace_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "error_by_class": {"a": 1}}\n{"step": 2, "error_by_class": {"a": 1}', encoding="utf-8")
    Reporter(tmp_path, LoopConfig(steps=10), first_step=2).close()
    assert path.read_text(encoding="utf-8") == '{"step": 1, "error_by_class": {"a": 1}}\n'


def test_means_of_other_metrics_are_over_all_numbers_however_they_came() -> None:
    """Each name by itself; an empty one counts for nothing, and what was taken is forgotten."""
    means, t = MetricMeans(), torch.zeros(1, dtype=torch.long)

    def add(**values: list[float]) -> None:
        metrics = {name: torch.tensor(numbers) for name, numbers in values.items()}
        means.add(LossOutput(torch.zeros(()), torch.zeros(1), torch.zeros(1), t, t, metrics))

    assert means.take() == {}
    add(a=[1.0, 2.0], b=[5.0])
    add(a=[6.0], b=[], c=[])
    assert means.take() == {"a": 3.0, "b": 5.0}
    add(b=[-1.0])
    assert means.take() == {"b": -1.0}
