"""UNet3D: the convolutional denoiser (Ho et al. 2020; Dhariwal and Nichol 2021), on patches of voxels.

Shape suffixes: B batch, C channels, the rest X Y Z. The grid enters as Morton-ordered voxels; each p^3 patch becomes the
channels of one cell, so that a p = 2 UNet at 32^3 costs what a plain one costs at 16^3 and still decides every voxel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
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
    doubled,
    group_norm,
    halved,
    laid_out,
)
from shapediff.models.layers import ConditionEmbedding, denoiser_inputs, run_block, zero_init


@dataclass(frozen=True)
class UNet3DConfig:
    """Sizes of a UNet3D.

    `width_multipliers` has one entry a level, each level at half the resolution of the one before; the levels in
    `attention_levels` (0 is the finest) carry self-attention after each residual block, as the middle always does.
    `resample_in_blocks` halves and doubles inside residual blocks (BigGAN; Dhariwal and Nichol 2021, table 1), not by
    plain convolutions. `recompute_activations` keeps the inputs of blocks alone for backward: less memory, a third more time.
    """

    width: int = 64
    width_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (2,)
    num_heads: int = 4
    patch_size: int = 2
    dropout: float = 0.0
    resample_in_blocks: bool = False
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        check_levels(self.width, self.width_multipliers, self.patch_size)
        if self.num_res_blocks < 1 or self.num_heads < 1:
            raise ValueError("num_res_blocks and num_heads must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        if any(not 0 <= level < len(self.width_multipliers) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels={self.attention_levels} must lie in [0, {len(self.width_multipliers)}), one a level"
            )

    def num_tokens(self, resolution: int) -> int:
        """The patches of a grid of `resolution` voxels a side."""
        return (resolution // self.patch_size) ** 3

    def build(self, *, resolution: int, num_classes: int, out_channels: int = 1) -> UNet3D:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where they cannot be halved often enough."""
        coarsest_side(resolution, patch_size=self.patch_size, num_levels=len(self.width_multipliers))
        return UNet3D(self, resolution=resolution, num_classes=num_classes, out_channels=out_channels)


class UNet3D(nn.Module):
    """The denoiser `net(x_t, t, label) -> like x_t` on Morton-ordered voxels (b, R^3); out (b, out_channels R^3)."""

    def __init__(self, config: UNet3DConfig, *, resolution: int, num_classes: int, out_channels: int = 1) -> None:
        super().__init__()
        self.config = config
        self.out_channels = out_channels
        side = resolution // config.patch_size
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        channels, condition = config.patch_size**3, 4 * config.width
        self.condition = ConditionEmbedding(condition, num_classes)
        self.cells = Cells(side, config.patch_size)
        self.conv_in = nn.Conv3d(channels, widths[0], 3, padding=1)
        self.position_in = Position(widths[0], side)

        self.down = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(self._stage(width, level_width, level))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(_down(width, side >> (level + 1), condition, config))
                skips.append(width)

        self.middle = nn.ModuleList(
            Stage(width, width, condition, num_heads=num_heads, dropout=config.dropout)
            for num_heads in (config.num_heads, 0)
        )

        self.up = nn.ModuleList()
        self.takes_skip: list[bool] = []  # one a module of `up`
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(self._stage(width, level_width, level, width_beside=skips.pop()))
                width = level_width
            self.takes_skip += [True] * (config.num_res_blocks + 1) + [False] * (level > 0)
            if level:
                self.up.append(_up(width, condition, config))

        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv3d(width, out_channels * channels, 3, padding=1))

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` of the right shapes."""
        return denoiser_inputs(batch_size, resolution)

    def forward(
        self, x_t: Float[Tensor, "b voxels"], t: Int[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b out_voxels"]:
        condition = F.silu(self.condition(t, label))
        h = self.position_in(laid_out(self.conv_in(self.cells.split(x_t))))  # b c x y z from here on
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, condition)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, condition)
        for stage, takes_skip in zip(self.up, self.takes_skip, strict=True):
            h = self._run(stage, h, condition, *([skips.pop()] if takes_skip else []))
        return self.cells.join(self.conv_out(self.norm_out(h, silu=True)), self.out_channels)

    def _stage(self, width_in: int, width: int, level: int, *, width_beside: int = 0) -> Stage:
        config = self.config
        return Stage(
            width_in + width_beside,
            width,
            4 * config.width,
            num_heads=config.num_heads if level in config.attention_levels else 0,
            dropout=config.dropout,
            width_beside=width_beside,
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed, in the order in which they run."""
        return [*self.down, *self.middle, *self.up]

    def _run(self, stage: nn.Module, *args: Tensor) -> Tensor:
        return run_block(stage, *args, recompute=self.config.recompute_activations)


class _DownBlock(nn.Module):
    """Halve the resolution inside a residual block, and say anew where each cell is."""

    def __init__(self, width: int, side: int, condition: int, config: UNet3DConfig) -> None:
        super().__init__()
        self.block = Stage(width, width, condition, dropout=config.dropout, resample=halved)
        self.position = Position(width, side)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.position(self.block(x, condition))


def _down(width: int, side: int, condition: int, config: UNet3DConfig) -> nn.Module:
    return _DownBlock(width, side, condition, config) if config.resample_in_blocks else Downsample(width, side)


def _up(width: int, condition: int, config: UNet3DConfig) -> nn.Module:
    if config.resample_in_blocks:
        return Stage(width, width, condition, dropout=config.dropout, resample=doubled)
    return Upsample(width)
