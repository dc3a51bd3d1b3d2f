"""UNet3D beside MONAI's DiffusionModelUNet with the same widths, blocks and attention: milliseconds and GFLOP/s a sample.

    python benchmarks/denoiser.py [--batch-size 4] [--threads 2] [--compile] [--out FILE.md]

Forward as in sampling, with weights cast once, and forward with backward as in training, in float32 as MONAI comes and in
bfloat16; MONAI also in the memory format channels_last_3d, which ours takes by itself on a CPU, and with freed memory kept, as
the commands of this package do. The ceilings are those of one convolution of 64 channels at 16^3. Needs: pip install --no-deps
monai.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shapediff.hardware import keep_freed_memory
from shapediff.models import UNet3DConfig
from shapediff.pipeline import rounded

RESOLUTION, WIDTHS, NUM_BLOCKS = 32, (32, 64, 128), 2
SECONDS = 6.0


@dataclass(frozen=True)
class Setting:
    """How a network is run."""

    bf16: bool
    channels_last: bool
    compiled: bool
    keeps_memory: bool = False

    def __str__(self) -> str:
        words = [
            "bf16" if self.bf16 else "float32",
            *["channels_last"] * self.channels_last,
            *["compiled"] * self.compiled,
            *["memory kept"] * self.keeps_memory,
        ]
        return ", ".join(words)


class Flat(nn.Module):
    """MONAI's UNet behind the call (x_t (b, R^3), t, label) that ours has."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        from monai.networks.nets import DiffusionModelUNet

        self.net = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=WIDTHS,
            attention_levels=(False, False, True),
            num_res_blocks=NUM_BLOCKS,
            num_head_channels=32,
            norm_num_groups=32,
            num_class_embeds=num_classes + 1,
        )

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        grid = x_t.reshape(-1, 1, *(RESOLUTION,) * 3)
        return self.net(grid, t, class_labels=label).reshape(len(x_t), -1)


def ours() -> nn.Module:
    """The same widths, blocks and attention."""
    config = UNet3DConfig(
        width=WIDTHS[0],
        width_multipliers=tuple(width // WIDTHS[0] for width in WIDTHS),
        num_res_blocks=NUM_BLOCKS,
        attention_levels=(len(WIDTHS) - 1,),
        patch_size=1,
    )
    return config.build(resolution=RESOLUTION, num_classes=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = _head(args)
    print("\n".join(lines))
    for line in _rows(args.batch_size, compiles=args.compile):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(args: argparse.Namespace) -> list[str]:
    return [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{RESOLUTION}^3, widths {WIDTHS}, {NUM_BLOCKS} blocks a level, attention at the coarsest, batch {args.batch_size}, "
        f"{args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}.",
        f"Ceilings, GFLOP/s: float32 {_ceiling(torch.float32):,.0f}, bf16 {_ceiling(torch.bfloat16):,.0f}.",
        "",
        "| network | setting | forward, ms a sample | GFLOP/s | times MONAI float32 | and backward, ms | GFLOP/s | times |",
        "|---|---|---|---|---|---|---|---|",
    ]


def _rows(batch_size: int, *, compiles: bool) -> Iterator[str]:
    base: tuple[float, float] | None = None
    for name, build in {"MONAI DiffusionModelUNet": Flat, "shapediff UNet3D": ours}.items():
        for setting in _settings(build is Flat, compiles=compiles):
            if setting.keeps_memory:
                keep_freed_memory()  # for good
            flops = _forward_flops(build(), bf16=setting.bf16)
            times = _measure(build, setting, batch_size)
            base = base or times
            cells = [
                f"{1000 * seconds:.1f} | {factor * flops / seconds / 1e9:,.0f} | {first / seconds:.2f}"
                for seconds, first, factor in zip(times, base, (1, 3), strict=True)
            ]
            yield f"| {name} | {setting} | {cells[0]} | {cells[1]} |"


def _settings(is_monai: bool, *, compiles: bool) -> list[Setting]:
    compiled = (False, True) if compiles else (False,)
    if not is_monai:
        return [Setting(bf16, False, how, True) for bf16, how in product((False, True), compiled)]
    as_it_comes = [Setting(*flags) for flags in product((False, True), (False, True), compiled)]
    return as_it_comes + [Setting(True, last, how, True) for last, how in product((False, True), compiled)]


def _ceiling(dtype: torch.dtype) -> float:
    """GFLOP/s of the fastest convolution of the network."""
    x = torch.randn(4, 64, 16, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(64, 64, 3, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        seconds = _best(lambda: F.conv3d(x, weight, padding=1), seconds=1.0)
    return 2 * 4 * 16**3 * 64**2 * 27 / seconds / 1e9


def _inputs(batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(batch_size, RESOLUTION**3, generator=generator)
    return x_t, torch.full((batch_size,), 500), torch.zeros(batch_size, dtype=torch.long)


def _forward_flops(net: nn.Module, *, bf16: bool) -> int:
    """Of one sample: ours takes another way in float32, where that has fewer."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), autocast:
        net(*_inputs(1))
    return counter.get_total_flops()


def _measure(build: Callable[[], nn.Module], setting: Setting, batch_size: int) -> tuple[float, float]:
    """Seconds a sample, (forward, forward and backward); the best of the runs that fit in SECONDS."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = build()
    if setting.channels_last:
        net = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    sampled = net if build is Flat or not setting.bf16 else rounded(net, torch.device("cpu"))
    sampled, call = (torch.compile(network) if setting.compiled else network for network in (sampled, net))
    inputs = _inputs(batch_size)
    autocast = torch.autocast("cpu", torch.bfloat16) if setting.bf16 else nullcontext()

    def forward() -> None:
        with torch.inference_mode():
            sampled(*inputs)

    def train() -> None:
        with autocast:
            loss = call(*inputs).float().square().mean()
        loss.backward()
        net.zero_grad(set_to_none=True)

    with autocast:  # which casts the weights once
        sampling = _best(forward)
    return sampling / batch_size, _best(train) / batch_size


def _best(call: Callable[[], object], *, seconds: float = SECONDS) -> float:
    call()
    call()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
