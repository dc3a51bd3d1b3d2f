"""How much of a device's arithmetic training uses, and how long 8 shapes take to sample.

    python benchmarks/utilisation.py [dit3d_b4@64 unet3d_base@64 ...] [--compile] [--profile] [--device cuda] [--out FILE.md]

Model FLOP utilisation is three forward passes' arithmetic (`shapediff.models.describe`: what is recomputed does not count) over
the time of one forward and backward in bfloat16, as a share of what the device does in one large matrix product. The batch is
doubled for as long as that gains 3 %. `--profile` says which operations take the rest. Sampling: a UNet3D of 32^3, DDIM with 50
steps, guidance 3.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from shapediff.hardware import default_device, keep_freed_memory
from shapediff.methods import SampleConfig, VoxelDiffusionConfig
from shapediff.models import PRESETS, describe
from shapediff.pipeline import rounded

NETWORKS = {
    "cuda": ("dit3d_b4@64", "dit3d_b2@64", "unet3d_base@64", "unet3d_base@32"),
    "cpu": ("unet3d_small@32", "dit3d_small@32"),
}
SAMPLED = {"cuda": "unet3d_base", "cpu": "unet3d_small"}
NUM_CLASSES, NUM_SAMPLED = 12, 8
SECONDS = 3.0
LARGEST_BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NAME@RESOLUTION", help="sizes that `model=NAME` takes")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes")
    parser.add_argument("--profile", action="store_true", help="the ten operations that take longest")
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    if args.device.type == "cpu":
        keep_freed_memory()
    lines = []
    for line in _lines(args):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(args: argparse.Namespace) -> Iterator[str]:
    device = args.device
    peak = _peak(device)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads of {platform.machine()}"
    )
    yield f"`python {' '.join(sys.argv)}`\n"
    yield f"{name}, torch {torch.__version__}; one matrix product in bfloat16: {peak / 1e12:.1f} TFLOP/s.\n"
    yield "| network | parameters, M | batch | samples a second | TFLOP/s | utilisation |\n|---|---|---|---|---|---|"
    slow = []
    for given in args.networks or NETWORKS[device.type]:
        preset, resolution = given.split("@")
        config = PRESETS[preset]
        costs = describe(config, int(resolution), num_classes=NUM_CLASSES)  # type: ignore[arg-type]
        network = config.build(resolution=int(resolution), num_classes=NUM_CLASSES).to(device)
        if args.compile:
            network.compile()
        batch, rate = _best_batch(network, int(resolution), device)
        used = 3 * costs.forward_flops * rate
        yield f"| {given} | {costs.parameters / 1e6:.1f} | {batch} | {rate:.1f} | {used / 1e12:.2f} | {100 * used / peak:.0f} % |"
        if args.profile:
            slow.append(f"\n{given}:\n\n{_slowest(_training(network, int(resolution), batch, device), device)}")
    yield from slow
    seconds = _sampling(device, compiles=args.compile)
    yield f"\n{NUM_SAMPLED} shapes of 32^3 by {SAMPLED[device.type]}, DDIM with 50 steps, guidance 3: {seconds:.2f} s."


def _training(network: nn.Module, resolution: int, batch: int, device: torch.device) -> Callable[[], None]:
    """One forward and backward."""
    x_t = torch.randn(batch, resolution**3, device=device)
    t, label = (torch.randint(high, (batch,), device=device) for high in (1000, NUM_CLASSES))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = network(x_t, t, label).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    return step


def _best_batch(network: nn.Module, resolution: int, device: torch.device) -> tuple[int, float]:
    """(batch size, samples a second) of the batch size from which on twice as many gain less than 3 %."""
    best, rate, batch = 0, 0.0, 1
    while batch <= LARGEST_BATCH:
        try:
            found = batch / _seconds(_training(network, resolution, batch, device), device)
        except torch.OutOfMemoryError:
            break
        if found < 1.03 * rate:
            break
        best, rate, batch = batch, found, 2 * batch
    return best, rate


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median of the runs that fit in SECONDS, the first two aside."""
    times: list[float] = []
    while len(times) < 5 or sum(times) < SECONDS:
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return sorted(times[2:])[len(times[2:]) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    """FLOP/s of a matrix product."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / _seconds(lambda: a @ b, device)


def _slowest(step: Callable[[], None], device: torch.device) -> str:
    step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as seen:
        step()
        _wait(device)
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(event, by), event.key) for event in seen.key_averages()), reverse=True)
    total = sum(seconds for seconds, _ in times)
    rows = [f"| {key[:90]} | {100 * seconds / total:.1f} % |" for seconds, key in times[:10]]
    return "\n".join(["| operation | share |", "|---|---|", *rows])


def _sampling(device: torch.device, *, compiles: bool) -> float:
    method = VoxelDiffusionConfig().build(resolution=32, num_classes=NUM_CLASSES)
    network = method.build_networks(PRESETS[SAMPLED[device.type]])["denoiser"].to(device).eval()  # type: ignore[arg-type]
    network = rounded(network, device)
    if compiles:
        network.compile()
    label, config = torch.zeros(NUM_SAMPLED, dtype=torch.long, device=device), SampleConfig(guidance_scale=3.0)

    @torch.inference_mode()
    def sample() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            method.sample({"denoiser": network}, label, range(NUM_SAMPLED), config=config)

    return _seconds(sample, device)


if __name__ == "__main__":
    main()
