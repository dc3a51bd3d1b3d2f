"""The two sides of an adversarial network on voxels: a generator, latents in, shapes out, and a critic that scores shapes.

Both are residual convolutions over cells, patches of p^3 voxels as channels (Gulrajani et al. 2017, appendix F, in three
dimensions), and both know the class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.models.convolution import (
    Cells,
    Position,
    Stage,
    check_levels,
    coarsest_side,
    doubled,
    group_norm,
    halved,
)
from shapediff.models.layers import run_block

LEAK = 0.2
"""The slope of the critic's activations below 0."""


@dataclass(frozen=True)
class VoxelGeneratorConfig:
    """Sizes of a VoxelGenerator.

    `width_multipliers` has one entry a level, the finest first, each level at half the resolution of the one before; the
    coarsest grid is made of the latent at once. `recompute_activations` keeps the inputs of blocks alone for backward.
    """

    width: int = 32
    width_multipliers: tuple[int, ...] = (1, 2, 4)
    patch_size: int = 2
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        check_levels(self.width, self.width_multipliers, self.patch_size)

    def num_tokens(self, resolution: int) -> int:
        """The patches of a grid of `resolution` voxels a side."""
        return (resolution // self.patch_size) ** 3

    def build(self, *, resolution: int, num_classes: int, latent_size: int = 128) -> VoxelGenerator:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where they cannot be halved often enough."""
        return VoxelGenerator(self, resolution=resolution, num_classes=num_classes, latent_size=latent_size)


@dataclass(frozen=True)
class VoxelCriticConfig:
    """Sizes of a VoxelCritic; the levels are as in a VoxelGenerator."""

    width: int = 32
    width_multipliers: tuple[int, ...] = (1, 2, 4)
    patch_size: int = 2

    def __post_init__(self) -> None:
        check_levels(self.width, self.width_multipliers, self.patch_size)

    def num_tokens(self, resolution: int) -> int:
        """The patches of a grid of `resolution` voxels a side."""
        return (resolution // self.patch_size) ** 3

    def build(self, *, resolution: int, num_classes: int) -> VoxelCritic:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where they cannot be halved often enough."""
        return VoxelCritic(self, resolution=resolution, num_classes=num_classes)


class VoxelGenerator(nn.Module):
    """`net(z, label) -> x`: shapes (b, R^3) in (-1, 1), Morton order, of latents (b, latent_size)."""

    def __init__(
        self, config: VoxelGeneratorConfig, *, resolution: int, num_classes: int, latent_size: int = 128
    ) -> None:
        super().__init__()
        self.config = config
        self.latent_size = latent_size
        widths = [config.width * multiplier for multiplier in reversed(config.width_multipliers)]
        self.side = _coarsest_side(config, resolution)
        condition = 4 * config.width
        self.condition = _LatentAndLabel(latent_size, condition, num_classes)
        self.start = nn.Linear(condition, widths[0] * self.side**3)
        self.blocks = nn.ModuleList([Stage(widths[0], widths[0], condition)])
        self.positions = nn.ModuleList([Position(widths[0], self.side)])
        for i, (width_in, width) in enumerate(pairwise(widths)):
            self.blocks.append(Stage(width_in, width, condition, resample=doubled))
            self.positions.append(Position(width, self.side << (i + 1)))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv3d(widths[-1], config.patch_size**3, 3, padding=1)
        self.cells = Cells(resolution // config.patch_size, config.patch_size)

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor]:
        """Arguments of `forward` of the right shapes."""
        return torch.empty(batch_size, self.latent_size), torch.zeros(batch_size, dtype=torch.long)

    def forward(
        self, z: Float[Tensor, "b latent"], label: Int[Tensor, " b"] | Float[Tensor, "b labels"]
    ) -> Float[Tensor, "b voxels"]:
        """`label` is a class, or the weights of a mixture of them, the null label's last."""
        condition = self.condition(z, label)
        h = self.start(condition).unflatten(1, (-1, *(self.side,) * 3))  # b c x y z from here on
        for block, position in zip(self.blocks, self.positions, strict=True):
            h = position(run_block(block, h, F.silu(condition), recompute=self.config.recompute_activations))
        return self.cells.join(self.conv_out(self.norm_out(h, silu=True)), 1).float().tanh()


class VoxelCritic(nn.Module):
    """D(x, y): one number for a shape (b, R^3), Morton order, of a class: higher for what looks real.

    No normalisation over samples, since the penalty is on the gradient of each alone (Gulrajani et al. 2017, sec. 4). The class
    enters as a projection, D = v . phi(x) + e_y . phi(x) (Miyato and Koyama 2018), which is what log p(y | x) of a softmax
    looks like, and costs one row a class; concatenating the label would need channels as large as the grid. Scores grow to tens,
    so that they are summed in float32; convolutions may run in bfloat16, where slopes were off by 0.3 % and the gradient of
    the penalty by 1 %, at half the time.
    """

    def __init__(self, config: VoxelCriticConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        features = 4 * config.width
        self.cells = Cells(resolution // config.patch_size, config.patch_size)
        self.conv_in = nn.Conv3d(config.patch_size**3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(_CriticBlock(width_in, width) for width_in, width in pairwise(widths))
        self.features = nn.Linear(widths[-1] * _coarsest_side(config, resolution) ** 3, features)
        self.value = nn.Linear(features, 1)
        self.label = nn.Embedding(num_classes + 1, features)
        nn.init.normal_(self.label.weight, std=0.02)

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` of the right shapes, as a batch of training has them: two shapes a sample, one between."""
        x = torch.empty(2 * batch_size, resolution**3)
        return x, torch.zeros(2 * batch_size, dtype=torch.long), x[:batch_size]

    def forward(
        self, x: Float[Tensor, "n voxels"], label: Int[Tensor, " n"], between: Float[Tensor, "b voxels"] | None = None
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " b"]]:
        """(D(x, label), the norm of the gradient of D by x at `between`, whose labels are the first b), differentiable both.

        The norm is taken in here, where the gradient is seen by no hook that DeepSpeed puts around a network.
        """
        scores = self.score(x, label)
        if between is None:
            return scores, scores.new_empty(0)
        return scores, gradient_norm(lambda point: self.score(point, label[: len(between)]), between)

    def score(self, x: Float[Tensor, "n voxels"], label: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """D(x, label)."""
        h = self.conv_in(self.cells.split(x))
        for block in self.blocks:
            h = block(h)
        phi = F.leaky_relu(self.features(F.leaky_relu(h, LEAK).flatten(1)), LEAK).float()
        with torch.autocast(x.device.type, enabled=False):
            return self.value(phi)[:, 0] + (self.label(label) * phi).sum(1)


def gradient_norm(critic: Callable[[Tensor], Tensor], x: Float[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """|| grad_x D(x) || of each sample, differentiable by the critic's weights; samples must not see each other."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.norm(dim=1)


class _LatentAndLabel(nn.Module):
    """One vector a sample from its latent and its label; the null label has the last row.

    Both start as loud: where the label was five times louder, a class became one shape before its latent was heard, and where it
    was ten times softer, classes came late.
    """

    def __init__(self, latent_size: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.latent = nn.Linear(latent_size, width)
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.latent.weight, std=latent_size**-0.5)
        nn.init.normal_(self.label.weight)

    def forward(self, z: Float[Tensor, "b latent"], label: Tensor) -> Float[Tensor, "b width"]:
        rows = label @ self.label.weight if label.is_floating_point() else self.label(label)
        return self.latent(z) + rows


class _CriticBlock(nn.Module):
    """Two convolutions on a residual path, which halves the resolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv3d(width_in, width_in, 3, padding=1)
        self.conv_2 = nn.Conv3d(width_in, width, 3, padding=1)
        self.skip = nn.Conv3d(width_in, width, 1)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x2 y2 z2"]:
        h = self.conv_1(F.leaky_relu(x, LEAK))
        return halved(self.conv_2(F.leaky_relu(h, LEAK))) + self.skip(halved(x))


def _coarsest_side(config: VoxelGeneratorConfig | VoxelCriticConfig, resolution: int) -> int:
    """Cells a side of the coarsest level. Raises ValueError where there are none."""
    return coarsest_side(resolution, patch_size=config.patch_size, num_levels=len(config.width_multipliers))
