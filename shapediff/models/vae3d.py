"""VAE3D: the convolutional encoder and decoder of a variational autoencoder (Kingma and Welling 2014), on patches of voxels.

Latents are a grid of cells with channels last, in Morton order. With 8 channels a cell that *is* a Morton-ordered grid of twice
the side, with 64 one of four times the side: what denoises voxels in patches of 2 or 4 denoises latents as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.models.convolution import (
    Cells,
    Downsample,
    Position,
    Stage,
    Upsample,
    check_levels,
    coarsest_side,
    group_norm,
    laid_out,
)
from shapediff.models.layers import run_block

MAX_LOG_VARIANCE = 10.0


@dataclass(frozen=True)
class VAE3DConfig:
    """Sizes of a VAE3D.

    Grids enter in patches of `patch_size` voxels; `width_multipliers` has one entry a level, each level at half the resolution of
    the one before, and a cell of the last one holds `latent_channels` numbers: 8 or 64, so that latents are a grid again.
    `recompute_activations` keeps the inputs of blocks alone for backward: less memory, a third more time.
    """

    width: int = 32
    width_multipliers: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    patch_size: int = 2
    latent_channels: int = 8
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        check_levels(self.width, self.width_multipliers, self.patch_size)
        if self.num_res_blocks < 1:
            raise ValueError(f"num_res_blocks={self.num_res_blocks} must be positive")
        if self.latent_channels not in (1, 8, 64, 512):
            raise ValueError(
                f"latent_channels={self.latent_channels} must be 8 or 64 (or 1, or 512): the cube of a power of two"
            )

    @property
    def downsampling(self) -> int:
        """How many voxels a side a latent cell stands for."""
        return self.patch_size * 2 ** (len(self.width_multipliers) - 1)

    @property
    def latent_patch(self) -> int:
        """The side of the patch that a latent cell's channels are, taken as voxels of a grid."""
        return round(self.latent_channels ** (1 / 3))

    def latent_resolution(self, resolution: int) -> int:
        """The side of the latents of grids of `resolution` voxels a side, taken as a grid of one channel."""
        return resolution // self.downsampling * self.latent_patch

    def num_tokens(self, resolution: int) -> int:
        """The latent cells of a grid of `resolution` voxels a side."""
        return (resolution // self.downsampling) ** 3

    def build(self, *, resolution: int, num_classes: int) -> VAE3D:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where they cannot be halved often enough."""
        coarsest_side(resolution, patch_size=self.patch_size, num_levels=len(self.width_multipliers))
        return VAE3D(self, resolution=resolution, num_classes=num_classes)


class Gaussian(NamedTuple):
    """A diagonal normal distribution: of the latents of each grid, say, or of those of each class."""

    mean: Float[Tensor, "b latents"]
    log_variance: Float[Tensor, "b latents"]

    def draw(self, eps: Float[Tensor, "b latents"]) -> Float[Tensor, "b latents"]:
        """z = mu + sigma eps, eps ~ N(0, 1): the draw through which gradients reach mu and sigma (Kingma and Welling 2014)."""
        return self.mean + (0.5 * self.log_variance).exp() * eps


class VAE3D(nn.Module):
    """q(z | x), the decoder, and p(z | y), one normal distribution for each class and, last, one for any shape.

    Grids are (b, R^3), latents (b, n), both in Morton order.
    """

    def __init__(self, config: VAE3DConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        side = resolution // config.patch_size
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        channels = config.patch_size**3
        self.cells = Cells(side, config.patch_size)
        self.latent_cells = Cells(side >> (len(widths) - 1), config.latent_patch)

        self.conv_in = nn.Conv3d(channels, widths[0], 3, padding=1)
        self.position_in = Position(widths[0], side)
        self.encoder, width = nn.ModuleList(), widths[0]
        for level, level_width in enumerate(widths):
            if level:
                self.encoder.append(Downsample(width, side >> level))
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(width, level_width))
                width = level_width
        self.norm_latent = group_norm(width)
        self.to_latent = nn.Conv3d(width, 2 * config.latent_channels, 1)

        self.from_latent = nn.Conv3d(config.latent_channels, width, 3, padding=1)
        self.position_latent = Position(width, side >> (len(widths) - 1))
        self.decoder = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.decoder.append(Stage(width, level_width))
                width = level_width
            if level:
                self.decoder.append(Upsample(width))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv3d(width, channels, 3, padding=1)

        num_latents = config.latent_resolution(resolution) ** 3
        self.prior = nn.Parameter(torch.zeros(num_classes + 1, 2 * num_latents))
        """Means, then log variances; all start as N(0, 1)."""

    def forward(
        self, x: Float[Tensor, "b voxels"], eps: Float[Tensor, "b latents"], label: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b voxels"], Gaussian, Gaussian]:
        """(decoded draw of the latents of x, q(z | x), p(z | label))."""
        posterior = self.encode(x)
        return self.decode(posterior.draw(eps)), posterior, self.prior_of(label)

    def encode(self, x: Float[Tensor, "b voxels"]) -> Gaussian:
        """q(z | x)."""
        h = self.position_in(laid_out(self.conv_in(self.cells.split(x))))
        for block in self.encoder:
            h = run_block(block, h, recompute=self.config.recompute_activations)
        both = self.to_latent(self.norm_latent(h, silu=True)).float()
        mean, log_variance = (self.latent_cells.join(half, 1) for half in both.chunk(2, 1))
        return Gaussian(mean, log_variance.clamp(-2 * MAX_LOG_VARIANCE, MAX_LOG_VARIANCE))

    def decode(self, z: Float[Tensor, "b latents"]) -> Float[Tensor, "b voxels"]:
        """The logit of each voxel's being inside."""
        h = self.position_latent(laid_out(self.from_latent(self.latent_cells.split(z))))
        for block in self.decoder:
            h = run_block(block, h, recompute=self.config.recompute_activations)
        return self.cells.join(self.conv_out(self.norm_out(h, silu=True)), 1).float()

    def prior_of(self, label: Int[Tensor, " b"] | Float[Tensor, "b labels"]) -> Gaussian:
        """p(z | label); of a mixture of labels, the normal distribution of the mixed means and log variances."""
        rows = label @ self.prior if label.is_floating_point() else self.prior[label]
        return Gaussian(*rows.chunk(2, 1))

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` of the right shapes."""
        eps = torch.empty(batch_size, self.config.latent_resolution(resolution) ** 3)
        return torch.empty(batch_size, resolution**3), eps, torch.zeros(batch_size, dtype=torch.long)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed, in the order in which they run."""
        return [*self.encoder, *self.decoder]
