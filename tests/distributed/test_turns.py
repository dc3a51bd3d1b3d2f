"""Two networks that train in turns, under ZeRO 0 to 2: the same on any number of ranks, killed and resumed, exported."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shapediff.checkpoint import read_export
from shapediff.engine.exporting import export_run
from shapediff.pipeline import ShapePipeline
from tests.distributed.forked import ForkedRanks
from tests.distributed.test_state import EPS, Recipe, assert_same_state, read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = [0, 1, 2]
STEPS = 8


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    with ForkedRanks() as server:
        yield server


class Gan(Recipe):
    """A generator and a critic of a few thousand weights; the generator moves at every second step."""

    def config(self, run: str, stage: int, **loop: Any) -> dict[str, Any]:
        sizes = {"width": 8, "width_multipliers": [1, 2]}
        method = {"name": "wgan_gp", "critic": sizes, "latent_size": 8, "num_critic_steps": 2}
        config = super().config(run, stage, **({"steps": STEPS, "checkpoint_every": 4} | loop))
        return config | {"model": {"name": "voxel_generator", **sizes}, "method": method}


@pytest.fixture(scope="module")
def straight(ranks: ForkedRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Gan:
    """Runs never stopped: "one" of one process in one micro batch, "zero0" to "zero2" of two ranks in two each."""
    recipe = Gan(data, tmp_path_factory.mktemp("turns"))
    every = {"checkpoint_every": 1, "keep_every": 1}
    assert ranks.train(recipe.config("one", 0, **every), ranks=1, eps=EPS).codes == [0]
    for stage in STAGES:
        outcome = ranks.train(recipe.config(f"zero{stage}", stage, micro_batch_size=1, **every), ranks=2, eps=EPS)
        assert outcome.codes == [0, 0], outcome.log
    return recipe


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(straight: Gan, stage: int) -> None:
    """As of one network; the critic's loss differentiates twice, and its scores are differences of larger numbers."""
    np.testing.assert_allclose(straight.losses(f"zero{stage}"), straight.losses("one"), rtol=1e-5)
    found, expected = (read(straight.states(run)[-1], "weight") for run in (f"zero{stage}", "one"))
    assert {name.split(".")[0] for name in found} == {"generator", "critic"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_each_turn_moves_its_own_network_alone(straight: Gan) -> None:
    """The critic at every step, the generator at every second: its weights and moments stay as they are between."""
    states = straight.states("zero2")
    facts = [json.loads((state / "progress.json").read_text())["optimizer_steps"] for state in states]
    assert facts == [{"generator": step // 2, "critic": step} for step in range(1, STEPS + 1)]
    weights = [read(state, "weight") for state in states]
    for before, after, step in zip(weights, weights[1:], range(2, STEPS + 1), strict=False):
        moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({"critic", "generator"} if step % 2 == 0 else {"critic"})


def test_what_a_method_reports_is_the_mean_over_the_ranks(straight: Gan) -> None:
    """The penalty and the distance make up the loss; pairs of a class are seen on the rank that has both."""
    one, two = (
        [json.loads(line) for line in (straight.folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "zero1")
    )
    for line, other in zip(one, two, strict=True):
        assert line["loss"] == pytest.approx(10 * line["gradient_penalty"] - line["wasserstein"], rel=1e-4)
        for name in ("gradient_penalty", "critic_slope", "wasserstein"):
            assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5)
        assert ("generator_loss" in line) == (line["step"] % 2 == 0)
        assert 0 <= line["diversity"] <= 1 and 0 < line["diversity_of_data"] <= 1 and 0.25 <= line["coverage"] <= 1


@pytest.mark.parametrize("stage", [0, 2])
def test_killed_and_resumed_is_the_same_run(ranks: ForkedRanks, straight: Gan, stage: int) -> None:
    """Between the critic's turn and the generator's next one: kill -9 after step 5, checkpoint at 3."""
    run, loop = f"killed{stage}", {"micro_batch_size": 1, "checkpoint_every": 3}
    assert ranks.train(straight.config(run, stage, **loop), ranks=2, eps=EPS, die_after_step=5).codes[0] == -9
    resumed = ranks.train(straight.config(run, stage, **loop), ranks=2, eps=EPS)
    assert resumed.codes == [0, 0] and "at step 3" in resumed.log
    np.testing.assert_array_equal(straight.losses(run), straight.losses(f"zero{stage}"))
    assert_same_state(straight.states(run)[-1], straight.states(f"zero{stage}")[-1])


def test_the_export_is_the_average_of_the_generator_alone(straight: Gan, tmp_path: Path) -> None:
    run = straight.folder / "zero1"
    average = read(straight.states("zero1")[-1], "ema")
    (network,) = read_export(run).networks.items()
    assert network[0] == "generator"
    for name, value in network[1].state_dict().items():
        assert torch.equal(value.flatten(), average[f"generator.{name}"])
    export_run(run, tmp_path / "out")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (run / "export" / file).read_bytes()
    assert ShapePipeline.from_pretrained(run)(2, label="ball").voxels.shape == (2, 8, 8, 8)


def test_16_bits_change_rounding_alone(ranks: ForkedRanks, straight: Gan) -> None:
    """bfloat16 has 8 bits of mantissa; constants in a turn run in it as the networks that are trained do."""
    config = straight.config("bf16", 1)
    config["deepspeed"]["precision"] = "bf16"
    assert ranks.train(config, ranks=1, eps=EPS).codes == [0]
    np.testing.assert_allclose(straight.losses("bf16"), straight.losses("one"), rtol=0.02)


def test_a_step_whose_first_turn_is_left_out_has_no_second(ranks: ForkedRanks, straight: Gan) -> None:
    """A learning rate without bound: the first update leaves weights that give no finite loss, for either network."""
    config = straight.config("spoilt", 1, max_skipped=3, checkpoint_every=1)
    config["optimizer"] = {"lr": 1e30, "warmup_steps": 0}
    outcome = ranks.train(config, ranks=2)
    assert outcome.codes == [1, 1] and "steps in a row" in outcome.log
    facts = json.loads((straight.states("spoilt")[-1] / "progress.json").read_text())
    taken = facts["step"] - facts["skipped"]
    assert facts["optimizer_steps"] == {"generator": taken // 2, "critic": taken} and facts["ema_updates"] == taken
    left_out = [json.loads(line) for line in (straight.folder / "spoilt" / "skipped.jsonl").read_text().splitlines()]
    assert len(left_out) == 3 and not math.isfinite(float(left_out[0]["samples"][0]["loss"]))


def test_stage_3_is_refused(ranks: ForkedRanks, straight: Gan) -> None:
    outcome = ranks.train(straight.config("zero3", 3), ranks=1)
    assert outcome.codes == [1] and "use deepspeed=zero2" in outcome.log
