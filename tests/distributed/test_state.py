"""A run loses nothing: the same curve on any number of ranks and under any ZeRO stage, killed and resumed bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shapediff.engine.exporting import export_run
from shapediff.engine.state_files import TensorFiles, finished_states
from tests.distributed.forked import ForkedRanks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STAGES = [0, 1, 2, 3]
STEPS = 20
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
NUM_KILLS = int(os.environ.get("SHAPEDIFF_TEST_KILLS", "6"))
"""How often the run that is killed at random moments is killed; each costs one to two seconds."""

EPS = 1e-3
"""Adam's, in place of 1e-8. Adam divides by the gradient's size: where a gradient is 0 but for rounding, as that of a bias
before a normalization, 1e-8 makes steps of lr out of rounding. With 1e-3 rounding stays rounding."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    with ForkedRanks() as server:
        yield server


class Recipe:
    """Configurations of runs on the same data, and what the runs left."""

    def __init__(self, data: Path, folder: Path) -> None:
        self._data, self.folder = data, folder

    def config(self, run: str, stage: int, **loop: Any) -> dict[str, Any]:
        defaults = {
            "steps": STEPS,
            "batch_size": 4,
            "log_every": 1,
            "sample_every": 0,
            "checkpoint_every": 10,
            "ema_decay": 0.9,
        }
        return {
            "run_dir": str(self.folder / run),
            "data": {"path": str(self._data), "resolution": 8},
            "model": {"name": "dit3d", "hidden_size": 24, "depth": 1, "num_heads": 2, "patch_size": 2},
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "deepspeed": {"zero_stage": stage, "precision": "float32"},
            "train": defaults | loop,
        }

    def lines(self, run: str) -> list[tuple[int, float]]:
        """(step, loss) of every step that was not left out."""
        lines = [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"]) for line in lines]

    def losses(self, run: str) -> np.ndarray:
        lines = self.lines(run)
        assert [step for step, _ in lines] == list(range(1, len(lines) + 1))
        return np.array([loss for _, loss in lines])

    def states(self, run: str) -> list[Path]:
        return finished_states(self.folder / run / "state")

    def saved_steps(self, run: str) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in self.states(run)]

    def export(self, run: str) -> dict[str, Tensor]:
        return load_file(self.folder / run / "export" / "model.safetensors")


def read(state: Path, kind: str) -> dict[str, Tensor]:
    """Whole flattened tensors of a state: "weight", a moment, or "ema"."""
    files = TensorFiles(sorted(state.glob("rank-*")))
    shapes = json.loads((state / "progress.json").read_text())["parameters"]
    whole = {}
    for name, shape in shapes.items():
        whole[name] = torch.full((int(np.prod(shape)),), torch.nan)
        files.fill(whole[name], f"{kind}/{name}", 0)
    return whole


def assert_same_state(found: Path, expected: Path) -> None:
    """Bit for bit, whoever wrote which part."""
    for kind in KINDS:
        for name, value in read(expected, kind).items():
            assert torch.equal(read(found, kind)[name], value), (kind, name)


@pytest.fixture(scope="module")
def recipe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe(data, tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def straight(ranks: ForkedRanks, recipe: Recipe) -> Recipe:
    """Runs never stopped that keep every step: "one" of one process, "zero0" to "zero3" of two ranks."""
    every = {"checkpoint_every": 1, "keep_every": 1}
    assert ranks.train(recipe.config("one", 0, **every), ranks=1, eps=EPS).codes == [0]
    for stage in STAGES:
        outcome = ranks.train(recipe.config(f"zero{stage}", stage, **every), ranks=2, eps=EPS)
        assert outcome.codes == [0, 0], outcome.log
    return recipe


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_learn_what_one_learns(straight: Recipe, stage: int) -> None:
    """float32 sums in another order differ by some 1e-7 of their terms; twenty steps of a smooth map keep that small."""
    np.testing.assert_allclose(straight.losses(f"zero{stage}"), straight.losses("one"), rtol=1e-5)
    found, expected = straight.export(f"zero{stage}"), straight.export("one")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_the_other_denoiser_learns_the_same_under_every_stage(ranks: ForkedRanks, recipe: Recipe) -> None:
    unet = {"name": "unet3d", "width": 8, "width_multipliers": [1, 2], "attention_levels": [1]}
    for run, stage, count in (("unet", 0, 1), *((f"unet{stage}", stage, 2) for stage in STAGES)):
        config = recipe.config(run, stage, steps=8, checkpoint_every=0) | {"model": unet}
        assert ranks.train(config, ranks=count, eps=EPS).codes == [0] * count
    for stage in STAGES:
        np.testing.assert_allclose(recipe.losses(f"unet{stage}"), recipe.losses("unet"), rtol=1e-5)
        for key, value in recipe.export("unet").items():
            torch.testing.assert_close(recipe.export(f"unet{stage}")[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_compiled_network_learns_what_it_learns_else(straight: Recipe, ranks: ForkedRanks, stage: int) -> None:
    """As one graph, compiled once; the names in its state and export are those of any other run, which may go on from it."""
    run = f"compiled{stage}"
    config = straight.config(run, stage, steps=8, checkpoint_every=8, compile=True)
    outcome = ranks.train(config, ranks=2, eps=EPS, says_what_it_compiles=True)
    assert outcome.codes == [0, 0] and outcome.log.count("a graph of") == 1, outcome.log
    np.testing.assert_allclose(straight.losses(run), straight.losses("one")[:8], rtol=1e-5)
    config["train"] |= {"steps": STEPS, "compile": False}
    assert ranks.train(config, ranks=2, eps=EPS).codes == [0, 0]
    for key, value in straight.export("one").items():
        torch.testing.assert_close(straight.export(run)[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_stage_3_is_not_compiled(ranks: ForkedRanks, recipe: Recipe) -> None:
    outcome = ranks.train(recipe.config("compiled3", 3, compile=True), ranks=1)
    assert outcome.codes == [1] and "use deepspeed=zero2" in outcome.log


def test_gradients_are_summed_in_float32_under_autocast(ranks: ForkedRanks, recipe: Recipe) -> None:
    """The first moment after one step is 0.1 times the gradient. Each rank's has 8 bits, and most of the sums do not fit in as
    many: summed in 16 bits, six of ten differ. Stage 3 has a product of its own, which rounds four of ten otherwise.
    """
    for stage in STAGES:
        config = recipe.config(f"sums{stage}", stage, steps=1, checkpoint_every=1)
        config["deepspeed"]["precision"] = "bf16"
        assert ranks.train(config, ranks=2, eps=EPS).codes == [0, 0]
    key = "denoiser.patch_out.weight"  # all that has a gradient in the first step, but for its bias
    found = [read(recipe.states(f"sums{stage}")[-1], "exp_avg")[key] for stage in STAGES]
    same = [float(torch.isclose(moments, found[0], rtol=1e-5, atol=0).float().mean()) for moments in found]
    assert same[:3] == [1, 1, 1] and same[3] > 0.5


def test_tokens_are_learnt_the_same_on_two_ranks(ranks: ForkedRanks, recipe: Recipe) -> None:
    """Sequences of different lengths, packed into one row a rank: another split of the batch is another packing."""
    tokens = {"name": "octree_transformer", "hidden_size": 24, "depth": 1, "num_heads": 2}
    for run, stage, count in (("tokens", 0, 1), ("tokens0", 0, 2), ("tokens2", 2, 2)):
        config = recipe.config(run, stage, steps=8, checkpoint_every=0)
        config |= {"model": tokens, "method": {"name": "octree_autoregression"}}
        outcome = ranks.train(config, ranks=count, eps=EPS)
        assert outcome.codes == [0] * count, outcome.log
    for run in ("tokens0", "tokens2"):
        np.testing.assert_allclose(recipe.losses(run), recipe.losses("tokens"), rtol=1e-5)
        for key, value in recipe.export("tokens").items():
            torch.testing.assert_close(recipe.export(run)[key], value, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_the_recursion_over_the_weights(straight: Recipe, stage: int) -> None:
    """Of the weights that the run had after each step, in float64; the export is that average."""
    run = f"zero{stage}"
    states = straight.states(run)
    assert len(states) == STEPS
    average = {name: value.double() for name, value in read(states[0], "ema").items()}
    for n, state in enumerate(states[1:], start=1):
        decay, weights = min(0.9, (1 + n) / (10 + n)), read(state, "weight")
        average = {name: decay * value + (1 - decay) * weights[name].double() for name, value in average.items()}
    for name, value in average.items():
        torch.testing.assert_close(straight.export(run)[name].flatten().double(), value, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("run", ["one", *(f"zero{stage}" for stage in STAGES)])
def test_the_states_export_what_the_run_exported(straight: Recipe, tmp_path: Path, run: str) -> None:
    """To the byte, with how far it was trained, from any number of ranks and any stage."""
    export_run(straight.folder / run, tmp_path / "out")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (straight.folder / run / "export" / file).read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_keeps_and_writes_its_share(straight: Recipe, stage: int) -> None:
    files = [load_file(path) for path in sorted(straight.states(f"zero{stage}")[-1].glob("rank-*"))]
    total = sum(value.numel() for value in straight.export("one").values())
    for kind in KINDS:
        sizes = [sum(value.numel() for key, value in file.items() if key.startswith(f"{kind}/")) for file in files]
        assert sum(sizes) == total
        # Stage 3 pads each parameter to a multiple of the ranks, the others all of a group: rank 0 may have some more.
        assert max(sizes) - min(sizes) <= len(straight.export("one"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_is_the_same_run(ranks: ForkedRanks, straight: Recipe, stage: int) -> None:
    """kill -9 after step 13, checkpoints at 10 and 20: losses, weights, moments and average as if nothing had been."""
    run = f"killed{stage}"
    killed, other = ranks.train(straight.config(run, stage), ranks=2, eps=EPS, die_after_step=13).codes
    assert killed == -9 and other != 0
    assert straight.saved_steps(run) == [10]
    resumed = ranks.train(straight.config(run, stage), ranks=2, eps=EPS)
    assert resumed.codes == [0, 0]
    assert "at step 10" in resumed.log
    np.testing.assert_array_equal(straight.losses(run), straight.losses(f"zero{stage}"))
    assert_same_state(straight.states(run)[-1], straight.states(f"zero{stage}")[-1])


def test_other_ranks_and_stages_continue_the_curve(ranks: ForkedRanks, straight: Recipe) -> None:
    """2 -> 1 -> 2 ranks and stage 1 -> 3 -> 1, then every other stage, in one run: only the order of sums changes."""
    ends = {4: (2, 1), 8: (1, 3), 12: (2, 1), 16: (1, 2), 18: (2, 0), STEPS: (2, 2)}
    for end, (count, stage) in ends.items():
        outcome = ranks.train(straight.config("changing", stage, steps=end), ranks=count, eps=EPS)
        assert outcome.codes == [0] * count, outcome.log
    np.testing.assert_allclose(straight.losses("changing"), straight.losses("one"), rtol=1e-5)
    last, expected = straight.states("changing")[-1], straight.states("one")[-1]
    for kind in KINDS:
        for name, value in read(expected, kind).items():
            torch.testing.assert_close(read(last, kind)[name], value, rtol=1e-3, atol=1e-6, msg=f"{kind} {name}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_changes_where_not_what(ranks: ForkedRanks, straight: Recipe, stage: int) -> None:
    """From step 10 on everything that can be is kept in CPU memory."""
    run, config = f"offloaded{stage}", straight.config(f"offloaded{stage}", stage)
    assert ranks.train(straight.config(run, stage, steps=10), ranks=2, eps=EPS).codes == [0, 0]
    config["deepspeed"] |= {"offload_optimizer": True, "offload_parameters": stage == 3}
    outcome = ranks.train(config, ranks=2, eps=EPS)
    assert outcome.codes == [0, 0], outcome.log
    np.testing.assert_allclose(straight.losses(run), straight.losses("one"), rtol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overflow_counts_for_nothing_but_the_scale(ranks: ForkedRanks, straight: Recipe, stage: int) -> None:
    """float16 with a loss scale far too high: the first steps are left out, by weights, moments and average alike."""

    def config(run: str, steps: int) -> dict[str, Any]:
        half = straight.config(run, stage, steps=steps, checkpoint_every=1, keep_every=1)
        half["deepspeed"]["precision"] = "fp16"
        return half

    whole, parts, too_high = f"half{stage}", f"halves{stage}", {"first_scale": 2.0**21}
    assert ranks.train(config(whole, 8), ranks=2, eps=EPS, **too_high).codes == [0, 0]
    facts = [json.loads((state / "progress.json").read_text()) for state in straight.states(whole)]
    scales = [fact["loss_scales"]["denoiser"]["cur_scale"] for fact in facts]
    left_out = [scale == before / 2 for scale, before in zip(scales, [2.0**21, *scales], strict=False)]
    assert left_out[:3] == [True] * 3 and left_out[-3:] == [False] * 3
    assert [fact["ema_updates"] for fact in facts] == list(np.cumsum(~np.array(left_out)))
    assert [fact["optimizer_steps"]["denoiser"] for fact in facts] == [fact["ema_updates"] for fact in facts]
    first, second, last = (read(straight.states(whole)[at], "weight") for at in (0, 1, -1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], last[name]) for name in first)

    for steps in (2, 8):  # in the middle of the steps left out
        assert ranks.train(config(parts, steps), ranks=2, eps=EPS, **(too_high if steps == 2 else {})).codes == [0, 0]
    assert straight.lines(parts) == straight.lines(whole)
    assert [step for step, _ in straight.lines(whole)] == [1 + i for i, out in enumerate(left_out) if not out]
    assert_same_state(straight.states(parts)[-1], straight.states(whole)[-1])


def test_precision_may_change_on_the_way(ranks: ForkedRanks, straight: Recipe) -> None:
    """float16 has 11 bits of mantissa, bfloat16 8: some 1e-3 a product, less in the mean."""
    for end, precision in ((5, "fp16"), (10, "bf16"), (15, "float32"), (STEPS, "fp16")):
        config = straight.config("precisions", 1, steps=end)
        config["deepspeed"]["precision"] = precision
        outcome = ranks.train(config, ranks=1, eps=EPS)
        assert outcome.codes == [0], outcome.log
        assert precision.replace("fp16", "float16").replace("bf16", "bfloat16") in outcome.log
    np.testing.assert_allclose(straight.losses("precisions"), straight.losses("one"), rtol=2e-3)


def test_killed_at_random_moments_ends_with_the_same_weights(ranks: ForkedRanks, straight: Recipe) -> None:
    """In turns in the middle of writing a checkpoint, while starting or resuming, and while training; one rank or both."""
    rng, loop = random.Random(0), {"checkpoint_every": 2}
    kills = whole = 0
    while kills < NUM_KILLS or not whole:
        run, rank = f"unlucky{whole}", rng.randrange(2)
        step = max(straight.saved_steps(run), default=0) + 2
        faults: list[dict[str, Any]] = [
            {"die_while_writing": [0, step, "manifest"] if kills % 2 else [rank, step, "tensors"]},
            {"kill_after": rng.uniform(0.2, 1.5)},
            {"die_within": [rank, rng.uniform(0, 0.5)]},
        ]
        fault = faults[kills % 3] if kills < NUM_KILLS else {}
        outcome = ranks.train(straight.config(run, 1, **loop), ranks=2, eps=EPS, **fault)
        assert -9 in outcome.codes or outcome.codes == [0, 0], outcome.log
        if outcome.codes != [0, 0]:
            kills += 1
            continue
        whole += 1
        np.testing.assert_array_equal(straight.losses(run), straight.losses("zero1"))
        assert_same_state(straight.states(run)[-1], straight.states("zero1")[-1])
        assert straight.saved_steps(run) == [16, 18, 20]
        assert not [path for path in (straight.folder / run / "state").iterdir() if path.suffix]
    print(f"{kills} kills in {whole} runs")


def test_a_state_too_many_goes_when_the_run_ends(ranks: ForkedRanks, straight: Recipe) -> None:
    """As a run leaves it that was killed after its last state and before it removed the oldest."""
    config = straight.config("ended", 0, steps=8, checkpoint_every=2)
    assert ranks.train(config, ranks=1, eps=EPS).codes == [0]
    states = straight.states("ended")
    shutil.copytree(states[0], states[0].with_name("step-00000002"))
    assert straight.saved_steps("ended") == [2, 4, 6, 8]
    assert ranks.train(config, ranks=1, eps=EPS).codes == [0]
    assert straight.saved_steps("ended") == [4, 6, 8]


def test_a_full_disk_ends_nothing_but_the_last_checkpoint(ranks: ForkedRanks, straight: Recipe) -> None:
    """Rank 1 can write no more than 10 kB a file from step 3 on: one warning a checkpoint, and an error at the end."""
    config = straight.config("full", 2, steps=6, checkpoint_every=2)
    outcome = ranks.train(config, ranks=2, file_limit=[1, 3, 10_000])
    assert outcome.codes == [1, 1]
    assert len(straight.losses("full")) == 6
    assert straight.saved_steps("full") == [2]
    assert not list((straight.folder / "full" / "state").glob("*.partial"))
    assert outcome.log.count("the run goes on, the states before it stay") == 2
    assert outcome.log.count("error: the state cannot be written: [Errno 27] File too large (rank 1)") == 1
    assert ranks.train(config, ranks=2).codes == [0, 0]  # room was made: on from step 2


def test_a_damaged_state_on_two_ranks_falls_back_to_the_one_before(ranks: ForkedRanks, straight: Recipe) -> None:
    config = straight.config("damaged", 3, steps=4, checkpoint_every=2)
    assert ranks.train(config, ranks=2, eps=EPS).codes == [0, 0]
    path = straight.states("damaged")[-1] / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    outcome = ranks.train(config, ranks=2, eps=EPS)
    assert outcome.codes == [0, 0]
    assert f"{path} is not what was written" in outcome.log
    assert "at step 2" in outcome.log
    np.testing.assert_array_equal(straight.losses("damaged"), straight.losses("zero3")[:4])


def test_checkpoints_are_made_by_time_too(ranks: ForkedRanks, straight: Recipe) -> None:
    """And by optimizer steps, not by the micro batches of one."""
    config = straight.config("timed", 1, steps=3, micro_batch_size=1, checkpoint_every=0, checkpoint_minutes=1e-6)
    assert ranks.train(config, ranks=2).codes == [0, 0]
    assert straight.saved_steps("timed") == [1, 2, 3]
    facts = [json.loads((state / "progress.json").read_text()) for state in straight.states("timed")]
    assert [fact["ema_updates"] for fact in facts] == [1, 2, 3]
