"""Training on latents beside training on voxels: samples a second of a whole step, by resolution.

    python benchmarks/latent.py [--resolutions 32 64 128] [--device cuda]

One denoiser, UNet3D of width 32, in bfloat16: on voxels in patches of 2, and on 8^3 cells of latents, whatever the resolution is;
these are encoded at every step, or come out of a cache (data.cache_latents). Weights and shapes are random: the cost does not
depend on them. The optimizer's own step is left out.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from shapediff.hardware import default_device
from shapediff.methods import LatentDiffusionConfig, Method, VoxelDiffusionConfig
from shapediff.methods.base import Batch
from shapediff.models import VAE3DConfig
from shapediff.models.presets import PRESETS

REPEATS = 3
AUTOENCODERS = {
    32: VAE3DConfig(),
    64: VAE3DConfig(patch_size=4, latent_channels=64),
    128: VAE3DConfig(patch_size=4, width_multipliers=(1, 1, 2), latent_channels=64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", choices=AUTOENCODERS, default=list(AUTOENCODERS))
    parser.add_argument("--device", default=str(default_device()))
    args = parser.parse_args()
    device = torch.device(args.device)
    print(
        f"| {'':12s} | batch | voxels, samples/s | latents encoded, samples/s | latents cached, samples/s | cached to voxels |"
    )
    print("|---|---|---|---|---|---|")
    for resolution in args.resolutions:
        batch_size = max(1, 16 * 32**3 // resolution**3)
        voxels = _rate(
            VoxelDiffusionConfig().build(resolution=resolution, num_classes=12), 2, batch_size, device, cached=False
        )
        latent = LatentDiffusionConfig(autoencoder=AUTOENCODERS[resolution]).build(
            resolution=resolution, num_classes=12
        )
        patch = AUTOENCODERS[resolution].latent_patch
        encoded = _rate(latent, patch, batch_size, device, cached=False)
        cached = _rate(latent, patch, 16, device, cached=True)
        print(
            f"| {resolution:3d}^3        | {batch_size:5d} | {voxels:17.2f} | {encoded:26.2f} | {cached:25.2f} "
            f"| {cached / voxels:15.1f}x |"
        )


def _rate(method: Method, patch: int, batch_size: int, device: torch.device, *, cached: bool) -> float:
    model = replace(PRESETS["unet3d_small"], patch_size=patch)
    networks = {name: network.to(device) for name, network in method.build_networks(model).items()}
    batch: Batch = {
        "voxels": torch.rand(batch_size, method.resolution**3, device=device) * 2 - 1,
        "label": torch.arange(batch_size, device=device) % 12,
    }
    if cached:
        with torch.no_grad():
            batch["latents"] = torch.cat([method.encode(networks, x) for x in batch["voxels"].split(1)])

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = method.loss(networks, batch, range(batch_size)).loss
        loss.backward()

    times = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return batch_size / sorted(times[1:])[REPEATS // 2]


if __name__ == "__main__":
    main()
