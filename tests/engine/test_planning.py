"""What a run costs: memory in closed form, activations against what a step really allocates, and the command."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from launch.config import compose
from shapediff import plan as command
from shapediff.engine.config import LoopConfig, TrainConfig
from shapediff.engine.costs import BACKWARD_SLACK, USABLE, Costs, hours, memory, run_costs
from shapediff.engine.distributed import DeepSpeedConfig
from shapediff.engine.planning import Plan, foresee
from shapediff.errors import ConfigError
from shapediff.hardware import ACCELERATORS, GIB, Accelerator
from shapediff.models import PRESETS, UNet3DConfig

P = 1_000_000
SMALL = Costs(parameters=P, forward_flops=10**9, activation_bytes=100, cast_weight_bytes=0, recompute=False)


@pytest.mark.parametrize(
    ("stage", "num_gpus", "per_parameter"),
    [
        # weights, gradients, two moments: the 16 bytes a parameter of float32 Adam, and 4 of the average, which is always shared
        (0, 1, (4, 4, 8, 4)),
        (0, 8, (4, 4, 8, 4 / 8)),
        # from stage 1 on a copy of the weights beside the moments, all of it shared
        (1, 1, (4, 4, 12, 4)),
        (1, 8, (4, 4, 12 / 8, 4 / 8)),
        (2, 8, (4, 4 / 8, 12 / 8, 4 / 8)),
        # what is gathered stays until backward
        (3, 8, (4 + 4 / 8, 4 / 8, 12 / 8, 4 / 8)),
        (3, 1, (4, 4, 12, 4)),
    ],
)
def test_memory_of_a_stage(stage: int, num_gpus: int, per_parameter: tuple[float, ...]) -> None:
    m = memory(SMALL, stage=stage, num_gpus=num_gpus, micro_batch_size=1)
    assert (m.weights, m.gradients, m.optimizer, m.ema) == tuple(P * n for n in per_parameter)
    assert m.total == sum(P * n for n in per_parameter) + m.working + m.other


def test_the_table_of_the_docs_is_what_is_counted() -> None:
    """docs/states.md, on N = 8; what stage 3 gathers comes on top."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "states.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `zero(\d)` \| (.*) \|$", page, re.MULTILINE)
    assert [stage for stage, _ in rows] == ["0", "1", "2", "3"]
    for stage, cells in rows:
        m = memory(SMALL, stage=int(stage), num_gpus=8, micro_batch_size=1)
        gathered = 4 * P if stage == "3" else 0
        written = [P * float(number) / (8 if of_n else 1) for number, of_n in re.findall(r"(\d+)(/N)?", cells)]
        assert written == [m.weights - gathered, m.gradients, m.optimizer, m.ema], stage


def test_stage_3_gathers_no_more_than_a_billion_weights() -> None:
    costs = replace(SMALL, parameters=4 * 10**9)
    assert memory(costs, stage=3, num_gpus=8, micro_batch_size=1).weights == 4 * 10**9 * (4 / 8 + 1)


def test_activations_or_the_optimizer_whichever_is_more() -> None:
    costs = replace(SMALL, activation_bytes=10 * P, cast_weight_bytes=2 * P)
    assert memory(costs, stage=1, num_gpus=1, micro_batch_size=4).working == int(BACKWARD_SLACK * 42 * P)
    assert memory(SMALL, stage=1, num_gpus=4, micro_batch_size=4).working == 12 * P // 4
    offloaded = memory(costs, stage=1, num_gpus=1, micro_batch_size=4, offload_optimizer=True)
    assert offloaded.optimizer == 0 and offloaded.weights == 4 * P


@pytest.mark.parametrize("num_gpus", [1, 8])
def test_what_is_offloaded_is_not_on_the_gpu(num_gpus: int) -> None:
    """The average lies beside the optimizer's weights. Of offloaded weights there is what is gathered, none of it resident."""
    costs = replace(SMALL, parameters=4 * 10**9)

    def kept(stage: int, **offload: bool) -> tuple[int, int, int]:
        m = memory(costs, stage=stage, num_gpus=num_gpus, micro_batch_size=1, **offload)
        return m.weights, m.optimizer, m.ema

    for stage in (1, 2):
        assert kept(stage, offload_optimizer=True) == (16 * 10**9, 0, 0)
    assert kept(3, offload_optimizer=True, offload_parameters=True) == (4 * 10**9, 0, 0)
    assert kept(3, offload_parameters=True)[1:] == (48 * 10**9 // num_gpus, 16 * 10**9 // num_gpus)


def test_hours() -> None:
    config = TrainConfig(train=LoopConfig(steps=3600, batch_size=10))
    assert hours(SMALL, config, tflops=0.03) == pytest.approx(1.0)  # 3 GFLOP a sample, 10 of them a second
    assert hours(replace(SMALL, recompute=True), config, tflops=0.03) == pytest.approx(4 / 3)
    assert hours(SMALL, TrainConfig(train=LoopConfig(steps=3600, batch_size=10, max_minutes=6)), tflops=0.03) == 0.1


def allocated(name: str, *, batch_size: int, bf16: bool, recompute: bool) -> int:
    """The most bytes that tensors take during forward and backward, over what was there before."""
    network = replace(PRESETS[name], recompute_activations=recompute).build(resolution=32, num_classes=3)
    x, zeros = torch.randn(batch_size, 32**3), torch.zeros(batch_size, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(x, zeros, zeros)
        (out.float() - x).square().mean().backward()
    now = most = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert now >= sum(p.nbytes for p in network.parameters())  # the gradients are left
    return most


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("name", "recompute", "batch_size"),
    [("unet3d_small", False, 8), ("dit3d_small", False, 4), ("dit3d_small", True, 4)],
)
def test_activations_are_what_a_step_allocates(name: str, recompute: bool, batch_size: int, bf16: bool) -> None:
    """Of batches so large that the gradients of all weights are not more."""
    config = TrainConfig(model=PRESETS[name])
    costs = run_costs(config, resolution=32, num_classes=3, recompute=recompute, autocast=bf16, on_gpu=False)
    expected = memory(costs, stage=0, num_gpus=1, micro_batch_size=batch_size).working
    assert allocated(name, batch_size=batch_size, bf16=bf16, recompute=recompute) == pytest.approx(expected, rel=0.12)


def a_plan(gpu_gib: float, *, num_gpus: int = 1, **loop: int) -> Plan:
    gpu = replace(ACCELERATORS["rtx4090"], memory=int(gpu_gib * GIB))
    return Plan(
        TrainConfig(model=UNet3DConfig(), train=LoopConfig(**loop), deepspeed=DeepSpeedConfig(zero_stage=0)),
        resolution=64,
        num_classes=3,
        gpu=gpu,
        num_gpus=num_gpus,
        autocast=True,
    )


def test_a_stage_that_is_left_open_is_the_first_that_fits() -> None:
    costs = replace(SMALL, parameters=10**9)
    needed = {stage: memory(costs, stage=stage, num_gpus=8, micro_batch_size=1).total for stage in (1, 2, 3)}
    assert needed[2] < needed[1]

    def stage(size: int, num_gpus: int = 8) -> int:
        left_open = TrainConfig(train=LoopConfig(batch_size=8), deepspeed=DeepSpeedConfig(zero_stage="auto"))
        gpu = replace(ACCELERATORS["h100"], memory=int(size / USABLE))
        plan = Plan(left_open, resolution=32, num_classes=3, gpu=gpu, num_gpus=num_gpus, autocast=True)
        plan.__dict__["costs"] = costs
        return plan.stage

    assert stage(needed[1] + GIB // 100) == 1
    assert stage(needed[1] - GIB // 100) == 2
    assert stage(min(needed.values()) - GIB // 100) == 3
    assert stage(needed[1] // 2, num_gpus=1) == 1  # nothing to share


def test_a_remedy_fits() -> None:
    """Each setting that is named makes it fit, the next larger micro batch would not."""
    plan = a_plan(24, batch_size=64)
    assert not plan.fits
    smaller, recompute = plan.remedies()
    assert recompute == "model.recompute_activations=true"
    size = int(smaller.removeprefix("train.micro_batch_size="))
    assert a_plan(24, batch_size=64, micro_batch_size=size).fits
    assert not a_plan(24, batch_size=64, micro_batch_size=2 * size).fits
    assert plan.memory(recompute=True).total <= plan.usable
    assert "try train.micro_batch_size=" in str(plan.warning())


def test_several_settings_together() -> None:
    """Where none is enough alone."""
    plan = a_plan(2.5, batch_size=64)
    (together,) = plan.remedies()
    match = re.fullmatch(r"model.recompute_activations=true train.micro_batch_size=(\d+)", together)
    assert match and plan.memory(micro_batch_size=int(match[1]), recompute=True).total <= plan.usable
    assert plan.memory(micro_batch_size=2 * int(match[1]), recompute=True).total > plan.usable


def with_deepspeed(name: str, parameters: int, size: float) -> Plan:
    """A run of so many parameters with `deepspeed=name` on eight GPUs of `size` bytes to use, two samples on each."""
    config = compose([f"deepspeed={name}", "train.batch_size=16", "experiment=gpu"], experiment="")
    gpu = replace(ACCELERATORS["h100"], memory=int(size / USABLE) + 2)
    plan = Plan(config, resolution=32, num_classes=3, gpu=gpu, num_gpus=8, autocast=True)
    plan.__dict__["costs"] = replace(SMALL, parameters=parameters, recompute=True)
    return plan


def test_a_remedy_goes_on_offloading() -> None:
    """What a run with zero2_offload is told to try is planned as it will run, fits, and zero3 without offloading would not."""
    p = 4 * 10**9
    enough = with_deepspeed("zero3_offload", p, 0).memory().total
    plan = with_deepspeed("zero2_offload", p, enough)
    assert plan.remedies() == ["deepspeed=zero3_offload"]
    assert with_deepspeed("zero3_offload", p, enough).fits and not with_deepspeed("zero3", p, enough).fits
    assert plan.memory(stage=3) == with_deepspeed("zero3_offload", p, enough).memory()
    assert with_deepspeed("zero3_offload", p, enough - GIB).remedies() == []
    assert with_deepspeed("zero2", p, enough + 5 * p).remedies() == ["deepspeed=zero3"]


def test_several_settings_together_go_on_offloading() -> None:
    """At the stage that is configured it stays as it is; at a further one its file of conf/deepspeed offloads, too."""
    costs = replace(SMALL, parameters=4 * 10**9, activation_bytes=30 * 10**9)
    recomputing = replace(costs, activation_bytes=20 * 10**9, recompute=True)
    settings = "model.recompute_activations=true train.micro_batch_size=1"
    for name, expected in (("zero2_offload", settings), ("zero3_offload", f"{settings} deepspeed=zero3_offload")):
        there = with_deepspeed(name, costs.parameters, 0)
        there.__dict__["costs_recomputing"] = recomputing
        needed = there.memory(recompute=True, micro_batch_size=1).total
        plan = with_deepspeed("zero2_offload", costs.parameters, needed)
        plan.__dict__.update(costs=costs, costs_recomputing=recomputing)
        assert plan.remedies() == [expected]


def test_a_method_in_turns_is_not_offered_stage_3() -> None:
    """Which it refuses; nor is that chosen where the stage is left open, and a run that asks for it is told at once."""
    wgan = compose(["experiment=wgan", "deepspeed=zero1"], experiment="")
    costs = replace(SMALL, parameters=8 * 10**9, recompute=True)
    needed = [memory(costs, stage=stage, num_gpus=8, micro_batch_size=2).total for stage in range(4)]
    assert needed[3] < min(needed[:3])
    gpu = replace(ACCELERATORS["h100"], memory=int(needed[3] / USABLE) + 2)  # so that stage 3 alone would fit
    plan = Plan(wgan, resolution=16, num_classes=3, gpu=gpu, num_gpus=8, autocast=True)
    left_open = replace(plan, config=replace(wgan, deepspeed=DeepSpeedConfig(zero_stage="auto")))
    for one in (plan, left_open):
        one.__dict__["costs"] = costs
        assert one.remedies() == []
    assert left_open.stage == 2
    with pytest.raises(ConfigError, match="use deepspeed=zero2"):
        replace(plan, config=replace(wgan, deepspeed=DeepSpeedConfig(zero_stage=3)))


def test_ranks_on_a_cpu_share_it() -> None:
    one, two = (
        command.make_plan(
            command.parser().parse_args(["experiment=cpu", "train.max_minutes=null", "--gpu", "cpu", "--gpus", n])
        )
        for n in "12"
    )
    assert two.gpu.memory == one.gpu.memory // 2
    assert two.hours() == one.hours()


def test_nothing_to_warn_of_and_nothing_to_do() -> None:
    assert a_plan(24, batch_size=8).warning() is None
    assert "smaller model" in str(a_plan(1, batch_size=8).warning())


def test_a_run_tells_before_it_starts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        foresee(a_plan(24, batch_size=8))
        foresee(a_plan(1, batch_size=8))
    assert [(r.levelname, r.message.split(" GiB")[0].split(" ", 1)[0]) for r in caplog.records] == [
        ("INFO", "about"),
        ("WARNING", "WARNING:"),
    ]


@pytest.mark.parametrize(("has_bf16", "expected"), [(False, "float32"), (True, "16 bits")])
def test_the_gpu_that_is_here_is_asked_for_16_bits(
    has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training does: a V100 or T4 has none, so that its activations are float32."""
    monkeypatch.setattr(command, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(command, "accelerator_of", lambda device: Accelerator("Tesla", 16 * GIB, None, None))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    settings = ["experiment=gpu", "data.path=data/shapes32"]
    command.main(settings)
    assert f"MiB of activations in {expected}" in capsys.readouterr().out
    command.main([*settings, "--gpu", "rtx3090"])
    assert "MiB of activations in 16 bits" in capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["model=dit3d_s4", "data.resolution=32", "train.batch_size=64"]
    assert command.main([*settings, "--gpu", "h200", "--gpus", "8", "experiment=gpu"]) == 0
    shown = capsys.readouterr().out
    assert "dit3d: 32.5 M parameters at 32^3" in shown
    assert "8 x 1 x 8 samples" in shown
    assert "\n> 1 " in shown and "\n  3 " in shown
    assert command.main([*settings, "--gpu-memory", "1500MiB", "experiment=gpu"]) == 1
    assert "WARNING: this run needs about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.stepz=3"], "train.stepz"),
        (["experiment=none_such"], "none_such"),
        (["data.path=nowhere"], "there is no data set at nowhere yet; say what it will be: data.resolution="),
        (["--gpus", "7", "train.batch_size=64"], "does not divide over 7 ranks"),
        (["data.resolution=33"], "resolution=33 is not divisible"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*arguments, "--gpu", "h200"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
