"""Samples a second of training and of sampling: UNet3D in bfloat16 beside itself in float32, and patches of 2 beside none.

python benchmarks/training.py [--batch-size 12] [--device cuda]
"""

from __future__ import annotations

import argparse
import time

import torch

from shapediff.hardware import default_device
from shapediff.models import UNet3DConfig

REPEATS = 5
RESOLUTION, NUM_CLASSES = 32, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--device", default=str(default_device()))
    args = parser.parse_args()
    device = torch.device(args.device)
    small = UNet3DConfig(width=32, num_res_blocks=1)
    plain = UNet3DConfig(
        width=32, num_res_blocks=1, width_multipliers=(1, 1, 2, 4), attention_levels=(3,), patch_size=1
    )
    baseline = None
    for name, config, dtype in (
        ("patches of 2, bf16", small, torch.bfloat16),
        ("patches of 2, float32", small, torch.float32),
        ("no patches, bf16", plain, torch.bfloat16),
    ):
        forward, both = _rates(config, dtype, device, args.batch_size)
        baseline = baseline or (forward, both)
        print(
            f"{name:24s} forward {forward:8.1f} samples/s ({baseline[0] / forward:.1f}x)   "
            f"forward and backward {both:8.1f} samples/s ({baseline[1] / both:.1f}x)"
        )


def _rates(config: UNet3DConfig, dtype: torch.dtype, device: torch.device, batch_size: int) -> tuple[float, float]:
    network = config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES).to(device)
    x_t = torch.randn(batch_size, RESOLUTION**3, device=device)
    t, label = (
        torch.randint(1000, (batch_size,), device=device),
        torch.randint(NUM_CLASSES, (batch_size,), device=device),
    )

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return network(x_t, t, label)

    def both() -> None:
        forward().float().square().mean().backward()

    with torch.no_grad():
        alone = _seconds(forward, device)
    return batch_size / alone, batch_size / _seconds(both, device)


def _seconds(call: object, device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[REPEATS // 2]


if __name__ == "__main__":
    main()
