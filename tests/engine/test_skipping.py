"""What is put down of a step that was left out; the steps themselves are in tests/distributed/skip_steps.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shapediff.engine.batches import MicroBatch
from shapediff.engine.optim import OptimizerConfig
from shapediff.engine.skipping import SKIPPED_FILE, SkippedSteps, carry_to_gradient, clip_and_check
from shapediff.errors import TrainingError
from shapediff.methods import LossOutput

DATASET: Any = SimpleNamespace(shapes=[SimpleNamespace(id=f"椅子#{i}") for i in range(9)], classes=["chair", "table"])
MICRO = MicroBatch({}, [0, 0, 0], [7, 8, 2])  # type: ignore[typeddict-item]


def output(*losses: float, loss: float | None = None) -> LossOutput:
    per_sample = torch.tensor(losses)
    t, label = torch.tensor([5, 6, 999]), torch.tensor([0, 1, 1])
    return LossOutput(per_sample.mean() if loss is None else torch.tensor(loss), per_sample, per_sample, t, label)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / SKIPPED_FILE).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("spoilt", "cause", "chosen"),
    [
        (output(1.0, math.nan, -math.inf), "loss", [1, 2]),
        (output(1.0, 2.0, 3.0, loss=math.inf), "loss", [0, 1, 2]),
        (output(1.0, 2.0, 3.0), "gradient", [0, 1, 2]),
    ],
)
def test_the_line_names_who_may_have_done_it(spoilt: LossOutput, cause: str, chosen: list[int], tmp_path: Path) -> None:
    SkippedSteps(tmp_path, DATASET, max_in_a_row=9).left_out(4, [MICRO], [spoilt], loss_is_scaled=False)
    (line,) = lines(tmp_path)
    assert (line["step"], line["cause"]) == (4, cause)
    places = [MICRO.indices[i] for i in chosen]
    assert [sample["index"] for sample in line["samples"]] == places
    assert [sample["id"] for sample in line["samples"]] == [f"椅子#{i}" for i in places]
    assert [sample["t"] for sample in line["samples"]] == [[5, 6, 999][i] for i in chosen]
    assert [sample["class"] for sample in line["samples"]] == [["chair", "table", "table"][i] for i in chosen]
    found = [float(sample["loss"]) for sample in line["samples"]]
    torch.testing.assert_close(torch.tensor(found), spoilt.per_sample[chosen], equal_nan=True)


def test_a_step_that_is_taken_ends_the_row(tmp_path: Path) -> None:
    skipped, bad = SkippedSteps(tmp_path, DATASET, max_in_a_row=2), output(math.nan, 0.0, 0.0)
    for step in (1, 3, 5):
        skipped.left_out(step, [MICRO], [bad], loss_is_scaled=False)
        skipped.taken()
    skipped.left_out(6, [MICRO], [bad], loss_is_scaled=False)
    with pytest.raises(TrainingError, match="2 steps in a row, the last of them step 7"):
        skipped.left_out(7, [MICRO], [bad], loss_is_scaled=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 5, 6, 7]


def test_an_overflow_under_a_scaled_loss_is_no_offence(tmp_path: Path) -> None:
    skipped = SkippedSteps(tmp_path, DATASET, max_in_a_row=1)
    skipped.left_out(1, [MICRO], [output(1.0, 2.0, 3.0)], loss_is_scaled=True)
    assert not (tmp_path / SKIPPED_FILE).exists()
    with pytest.raises(TrainingError):
        skipped.left_out(2, [MICRO], [output(1.0, math.nan, 3.0)], loss_is_scaled=True)


def test_a_finite_loss_keeps_its_gradient_and_another_has_none() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    assert torch.autograd.grad(carry_to_gradient(x**2), x)[0] == 6
    assert torch.autograd.grad(carry_to_gradient(x**2 + math.inf), x)[0].isnan()


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_plain_optimizer_clips_and_leaves_out(grad_clip: float) -> None:
    def run(gradients: list[float], *, checked: bool) -> tuple[torch.Tensor, list[float]]:
        network, norms = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.ones_(network.weight)
        optimizer: Any = OptimizerConfig(lr=0.1).build(network)
        if checked:
            clip_and_check(optimizer, grad_clip=grad_clip)
        for gradient in gradients:
            network.weight.grad = torch.full((1, 1), gradient)
            if not checked and grad_clip:
                torch.nn.utils.clip_grad_norm_(network.parameters(), grad_clip)
            optimizer.step()
            norms += [float(optimizer._global_grad_norm)] if checked else []
        return network.weight.detach(), norms

    weight, norms = run([2.0, math.inf, -3.0, math.nan], checked=True)
    assert torch.equal(weight, run([2.0, -3.0], checked=False)[0])
    assert norms[:3] == [2.0, math.inf, 3.0] and math.isnan(norms[3])
