"""The smallest denoiser that can be the best one: on Gaussian data E[x_0 | x_t] is a line in x_t, one a timestep."""

from __future__ import annotations

import torch
from torch import nn

from shapediff.methods import VoxelDiffusion
from shapediff.methods.base import Batch

MEAN, STD = 0.2, 0.3


class Lines(nn.Module):
    """A line a timestep, and with `learned` a number a timestep in the second half of the channels."""

    def __init__(self, num_timesteps: int, *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.slope, self.offset, self.out = (nn.Parameter(torch.zeros(num_timesteps)) for _ in range(3))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        line = self.slope[t][:, None] * x_t + self.offset[t][:, None]
        return torch.cat([line, self.out[t][:, None].expand_as(x_t)], 1) if self.learned else line


def gaussian_batch(num: int, method: VoxelDiffusion) -> Batch:
    """Voxels from N(MEAN, STD^2), each by itself, all of class 0."""
    voxels = MEAN + STD * torch.randn(num, method.resolution**3, generator=torch.Generator().manual_seed(1))
    return {"voxels": voxels, "label": torch.zeros(num, dtype=torch.int64)}


def fit(parameters: list[nn.Parameter], network: Lines, method: VoxelDiffusion, batch: Batch) -> None:
    """Bring the method's loss on this batch, with one fixed draw of noise, to its minimum over `parameters`."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, tolerance_grad=0, tolerance_change=0)

    def closure() -> torch.Tensor:
        network.zero_grad()
        # LBFGS takes curvatures below 1e-10 for none.
        loss = 1e6 * method.loss({"denoiser": network}, batch, range(len(batch["label"]))).loss
        loss.backward()
        return loss

    optimizer.step(closure)
