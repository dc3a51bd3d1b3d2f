"""MONAI's side of compare.py: train its DiffusionModelUNet for some minutes, sample with its DDIMScheduler, write grids."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from denoiser import RESOLUTION, Flat

from shapediff.data.dataset import ShapeDataset
from shapediff.evaluate import HELD_OUT
from shapediff.files import write_json
from shapediff.grid.morton import morton_to_dense

BATCH_SIZE, SAMPLED_TOGETHER = 12, 16
TUTORIAL_RATE = 1e-4
RATE, WARMUP_STEPS, DECAY_FRACTION, EMA_DECAY = 1e-3, 20, 0.4, 0.99
"""As our side has them, fit to some hundred steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--num", type=int)
    parser.add_argument(
        "--fast", action="store_true", help="bf16 autocast, channels last, and rate and EMA of our side"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    data = ShapeDataset(args.data, split="train")
    net = Flat(len(data.classes))
    if args.fast:
        net = net.to(memory_format=torch.channels_last_3d)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.fast else nullcontext()
    num_steps, loss = train(net, data, args.minutes, autocast, is_tuned=args.fast)
    print(f"{num_steps} steps, loss {loss:.3f}")
    held_out = np.concatenate([ShapeDataset(args.data, split=split).labels for split in HELD_OUT])
    started, total = time.monotonic(), 0
    for label, name in enumerate(data.classes):
        num = args.num or int((held_out == label).sum())
        write(args.to / "samples" / f"{name}.npz", sample(net.eval(), label, num, args.steps, autocast))
        total += num
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    seconds_each = (time.monotonic() - started) / total
    samples_seen = num_steps * BATCH_SIZE
    write_json(
        args.to / "facts.json", {"millions": millions, "seconds_each": seconds_each, "samples_seen": samples_seen}
    )


def train(net: Flat, data: ShapeDataset, minutes: float, autocast, *, is_tuned: bool) -> tuple[int, float]:
    """Its tutorial's loop: Adam, a random timestep, squared error of epsilon. Returns steps and the mean of the last losses."""
    scheduler = DDPMScheduler(
        num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=0.0005, beta_end=0.0195
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE if is_tuned else TUTORIAL_RATE)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY)
    )
    draw, num_steps, losses = np.random.default_rng(0), 0, [0.0]
    started = time.monotonic()
    while (share := (time.monotonic() - started) / (60 * minutes)) < 1:
        if is_tuned:
            rate = RATE * min(1, (num_steps + 1) / (WARMUP_STEPS + 1)) * min(1, (1 - share) / DECAY_FRACTION)
            optimizer.param_groups[0]["lr"] = rate
        batch = data.batch(draw.integers(len(data), size=BATCH_SIZE))
        images = morton_to_dense(batch["voxels"])[:, None]
        noise, t = torch.randn_like(images), torch.randint(1000, (BATCH_SIZE,))
        with autocast:
            noisy = scheduler.add_noise(images, noise, t)
            loss = F.mse_loss(net.net(noisy, t, class_labels=batch["label"]).float(), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        num_steps += 1
        losses = [*losses[-49:], loss.item()]
    if is_tuned:
        net.load_state_dict(average.module.state_dict())
    return num_steps, float(np.mean(losses))


@torch.inference_mode()
def sample(net: Flat, label: int, num: int, num_steps: int, autocast) -> np.ndarray:
    """(num, R, R, R) bool by its inferer and its DDIM."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=0.0005, beta_end=0.0195, clip_sample=True
    )
    scheduler.set_timesteps(num_inference_steps=num_steps)
    parts = []
    for start in range(0, num, SAMPLED_TOGETHER):
        size = min(SAMPLED_TOGETHER, num - start)
        noise = torch.randn(size, 1, *(RESOLUTION,) * 3)
        labelled = Labelled(net.net, torch.full((size,), label))
        with autocast:
            found = DiffusionInferer(scheduler).sample(noise, labelled, scheduler, verbose=False)
        parts.append((found[:, 0].float() > 0).numpy())
    return np.concatenate(parts)


class Labelled(torch.nn.Module):
    """The network with its class given, which the inferer does not pass on."""

    def __init__(self, net: torch.nn.Module, label: torch.Tensor) -> None:
        super().__init__()
        self.net, self.label = net, label

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: None = None) -> torch.Tensor:
        return self.net(x, timesteps=timesteps, class_labels=self.label)


def write(path: Path, grids: np.ndarray) -> None:
    """As open_grid_file reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, packed=np.packbits(grids.reshape(len(grids), -1), axis=1))


if __name__ == "__main__":
    main()
