"""What a run will cost, before it starts: `python -m shapediff.plan [experiment=NAME] [group.setting=value ...] --gpu h200`.

Settings are those of launch/train.py. Nothing is trained, and no data is read but the manifest of the data set, if it is there.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from shapediff.config_io import named_to_dict
from shapediff.data.manifest import MANIFEST_NAME, read_manifest
from shapediff.engine.config import DataConfig, TrainConfig
from shapediff.engine.costs import UTILISATION
from shapediff.engine.exporting import duration
from shapediff.engine.planning import Plan
from shapediff.errors import ConfigError
from shapediff.hardware import ACCELERATORS, GIB, Accelerator, accelerator_of, default_device, fast_bf16
from shapediff.models import MODELS

NUM_CLASSES = 10
"""Taken where there is no data set yet: a class more costs one row of one table."""
SHORT = 0.05
"""Seconds of a step on a GPU below which arithmetic is not what takes the time."""
UNITS = {"GIB": GIB, "GB": 10**9, "MIB": 2**20, "MB": 10**6}


def parser() -> argparse.ArgumentParser:
    """The command line of planning."""
    p = argparse.ArgumentParser(
        prog="python -m shapediff.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("settings", nargs="*", metavar="SETTING", help="as for launch/train.py: experiment=shapes64 ...")
    p.add_argument("--gpu", choices=ACCELERATORS, help="default: what this machine has")
    p.add_argument("--gpus", type=int, default=1, help="how many train together (default 1)")
    p.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="of each, such as 80GiB, in place of the table's")
    p.add_argument("--tflops", type=float, help="peak of each in the run's precision, in place of the table's")
    p.add_argument(
        "--utilisation", type=float, default=UTILISATION, help=f"share of the peak reached (default {UTILISATION})"
    )
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 where the run fits, 1 where memory would run out, 2 for what cannot be planned."""
    args = parser().parse_intermixed_args(arguments)
    try:
        plan = make_plan(args)
        print("\n".join(report(plan, args.utilisation)))
        warning = plan.warning()
    except ValueError as error:  # among them those that shapediff raises on purpose
        print(f"error: {error}", file=sys.stderr)
        return 2
    if warning:
        print(f"\nWARNING: {warning}")
    return 1 if warning else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """The plan that the arguments ask for. Raises ConfigError or ValueError, saying why, where there is none."""
    gpu = _gpu(args)
    config = _config(args.settings, experiment="gpu" if gpu.is_gpu else "cpu")
    resolution, num_classes = _data(config)
    return Plan(
        config,
        resolution=resolution,
        num_classes=num_classes,
        gpu=gpu,
        num_gpus=args.gpus,
        autocast=_uses_autocast(config, args),
    )


def report(plan: Plan, utilisation: float) -> Iterator[str]:
    """What is printed, line by line."""
    costs, loop, gpu = plan.costs, plan.config.train, plan.gpu
    micro, accumulation = loop.split(plan.num_gpus)
    name = named_to_dict(MODELS, plan.config.model)["name"]
    yield f"{name}: {costs.parameters / 1e6:.1f} M parameters at {plan.resolution}^3, {plan.num_classes} classes"
    yield (
        f"a sample: {costs.forward_flops / 1e9:,.1f} GFLOP forward, {costs.train_flops / 1e9:,.1f} in training; "
        f"{_mib(costs.activation_bytes)} MiB of activations in {'16 bits' if plan.autocast else 'float32'}"
        + ("" if costs.recompute else f", {_mib(plan.costs_recomputing.activation_bytes)} if recomputed")
    )
    yield (
        f"a step: {plan.num_gpus} x {accumulation} x {micro} samples (GPUs x accumulation x micro batch), "
        f"{loop.batch_size * costs.train_flops / 1e12:,.2f} TFLOP"
    )
    yield ""
    yield f"GiB on each {gpu.name} of {gpu.memory / GIB:.4g} GiB:"
    yield "  ZeRO   weights gradients optimizer       EMA activations   other     total"
    yield from (_row(plan, stage) for stage in plan.stages)
    yield "  > is configured. Activations: with what backward needs on the way; other: CUDA or Python, and buffers to exchange"
    yield ""
    yield _time(plan, utilisation)


def _row(plan: Plan, stage: int) -> str:
    memory = plan.memory(stage=stage)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.ema, memory.working, memory.other, memory.total)
    cells = "".join(f"{part / GIB:10.2f}" for part in parts)
    too_much = "" if memory.total <= plan.usable else "   too much"
    return f"{'>' if stage == plan.stage else ' '} {stage}  {cells}{too_much}"


def _time(plan: Plan, utilisation: float) -> str:
    loop, hours = plan.config.train, plan.hours(utilisation)
    if hours is None:
        return f"{loop.steps} steps; for the hours, say --tflops"
    step = 3600 * hours / loop.steps
    bound = f" (train.max_minutes={loop.max_minutes:g})" if loop.max_minutes else ""
    small = (
        "; so short a step takes longer, since starting its kernels does" if plan.gpu.is_gpu and step < SHORT else ""
    )
    return (
        f"{loop.steps} steps{bound}: about {duration(3600 * hours)}, if {utilisation:.0%} of {plan.peak_tflops:g} TFLOP/s "
        f"are reached, which is assumed{small}"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _gpu(args: argparse.Namespace) -> Accelerator:
    if args.gpus < 1 or not 0 < args.utilisation <= 1 or (args.tflops is not None and args.tflops <= 0):
        raise ConfigError("--gpus must be at least 1, --utilisation in (0, 1] and --tflops positive")
    if args.gpu is None and args.gpu_memory:
        gpu = Accelerator("GPU", args.gpu_memory, None, None)
    elif args.gpu in (None, "cpu"):
        gpu = _shared(accelerator_of(torch.device("cpu") if args.gpu else default_device()), args.gpus)
    else:
        gpu = ACCELERATORS[args.gpu]
    tflops = {"bf16_tflops": args.tflops, "float32_tflops": args.tflops} if args.tflops else {}
    return replace(gpu, memory=args.gpu_memory or gpu.memory, **tflops)


def _shared(here: Accelerator, num_ranks: int) -> Accelerator:
    """What each rank has of this machine: a GPU of its own, or its part of the CPU."""
    if here.is_gpu:
        return here
    parts = (part and part / num_ranks for part in (here.bf16_tflops, here.float32_tflops))
    return Accelerator(here.name, here.memory // num_ranks, *parts)


def _config(settings: Sequence[str], *, experiment: str) -> TrainConfig:
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # launch/ lies beside the package and is not installed
    try:
        from launch.config import compose
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"planning reads launch/ and conf/ of the repository and what training needs: {error}"
        ) from error
    return compose(settings, experiment=experiment)


def _data(config: TrainConfig) -> tuple[int, int]:
    """(resolution, number of classes) of the data set, or of what the settings say of one that is not there yet."""
    from launch.default_data import RESOLUTION

    path, resolution = Path(config.data.path), config.data.resolution
    if (path / MANIFEST_NAME).exists():
        manifest = read_manifest(path)
        return resolution or manifest.resolution, len(manifest.classes)
    if config.data.path == DataConfig().path:  # made when training starts
        return resolution or RESOLUTION, NUM_CLASSES
    if resolution is None:
        raise ConfigError(f"there is no data set at {path} yet; say what it will be: data.resolution=32")
    return resolution, NUM_CLASSES


def _uses_autocast(config: TrainConfig, args: argparse.Namespace) -> bool:
    """Whether matrix products will run in 16 bits there; a GPU that is not here is taken to do so, as all of ACCELERATORS do."""
    if config.deepspeed.precision != "auto":
        return config.deepspeed.precision != "float32"
    if args.gpu == "cpu":
        return fast_bf16(torch.device("cpu"))
    is_here = args.gpu is None and not args.gpu_memory
    return fast_bf16(default_device()) if is_here else True


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9.]+) *(GIB|GB|MIB|MB)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; write such as 80GiB, 24GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
