"""UNet3D: the convolutional denoiser (Ho et al. 2020; Dhariwal and Nichol 2021), on patches of voxels.

Shape suffixes: B batch, C channels, the rest X Y Z. The grid enters as Morton-ordered voxels; each p^3 patch becomes the
channels of one cell, so that a p = 2 UNet at 32^3 costs what a plain one costs at 16^3 and still decides every voxel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.grid.morton import dense_to_morton, morton_to_dense, patches, unpatch
from shapediff.models.layers import ConditionEmbedding, SelfAttention, zero_init


@dataclass(frozen=True)
class UNet3DConfig:
    """Sizes of a UNet3D.

    `width_multipliers` has one entry a level, each level at half the resolution of the one before; the levels in
    `attention_levels` (0 is the finest) carry self-attention after each residual block, as the middle always does.
    """

    width: int = 64
    width_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (2,)
    num_heads: int = 4
    patch_size: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.width_multipliers or min(self.width_multipliers) < 1 or self.num_res_blocks < 1:
            raise ValueError("width_multipliers and num_res_blocks must be positive")
        if self.width % 8 or self.width < 8:
            raise ValueError(f"width={self.width} must be a multiple of 8 (group normalisation)")
        if any(not 0 <= level < len(self.width_multipliers) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels={self.attention_levels} must lie in [0, {len(self.width_multipliers)}), one a level"
            )

    def build(self, *, resolution: int, num_classes: int) -> UNet3D:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where they cannot be halved often enough."""
        step = self.patch_size * 2 ** (len(self.width_multipliers) - 1)
        if resolution % step or resolution < step:
            raise ValueError(
                f"resolution={resolution} is not divisible by patch_size * 2^(levels - 1) = {step}; "
                "use a smaller patch_size or fewer width_multipliers"
            )
        return UNet3D(self, resolution=resolution, num_classes=num_classes)


class UNet3D(nn.Module):
    """The denoiser `net(x_t, t, label) -> like x_t` on Morton-ordered voxels (b, R^3)."""

    def __init__(self, config: UNet3DConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        cells = resolution // config.patch_size
        widths = [config.width * multiplier for multiplier in config.width_multipliers]
        channels, condition = config.patch_size**3, 4 * config.width
        self.condition = ConditionEmbedding(condition, num_classes)
        self.conv_in = nn.Conv3d(channels, widths[0], 3, padding=1)
        self.position_in = _Position(widths[0], cells)

        self.down = nn.ModuleList()
        skips, width = [widths[0]], widths[0]
        for level, level_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(
                    _Stage(width, level_width, condition, config, attends=level in config.attention_levels)
                )
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(_Downsample(width, cells >> (level + 1)))
                skips.append(width)

        self.middle = nn.ModuleList(_Stage(width, width, condition, config, attends=i == 0) for i in range(2))

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                attends = level in config.attention_levels
                self.up.append(_Stage(width + skips.pop(), level_width, condition, config, attends=attends))
                width = level_width
            if level:
                self.up.append(_Upsample(width))

        self.norm_out = _group_norm(width)
        self.conv_out = zero_init(nn.Conv3d(width, channels, 3, padding=1))

    def forward(
        self, x_t: Float[Tensor, "b voxels"], t: Int[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b voxels"]:
        condition = F.silu(self.condition(t, label))
        h = self.position_in(self.conv_in(_voxels_to_cells(x_t, self.config.patch_size)))
        skips = [h]
        for stage in self.down:
            h = stage(h, condition)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, condition)
        for stage in self.up:
            h = stage(h if isinstance(stage, _Upsample) else torch.cat([h, skips.pop()], 1), condition)
        return _cells_to_voxels(self.conv_out(F.silu(self.norm_out(h))))


class _Stage(nn.Module):
    """A residual block with AdaGN (Dhariwal and Nichol 2021, sec. 3), then self-attention where asked."""

    def __init__(self, width_in: int, width: int, condition: int, config: UNet3DConfig, *, attends: bool) -> None:
        super().__init__()
        self.norm_1 = _group_norm(width_in)
        self.conv_1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.scale_shift = nn.Linear(condition, 2 * width)
        self.norm_2 = _group_norm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = zero_init(nn.Conv3d(width, width, 3, padding=1))
        self.skip = nn.Identity() if width_in == width else nn.Conv3d(width_in, width, 1)
        self.attention = _GridAttention(width, config.num_heads) if attends else None

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b d x y z"]:
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.scale_shift(condition)[:, :, None, None, None].chunk(2, 1)
        h = self.norm_2(h) * (1 + scale) + shift
        h = self.skip(x) + self.conv_2(self.dropout(F.silu(h)))
        return h if self.attention is None else self.attention(h)


class _GridAttention(nn.Module):
    """Residual self-attention over the cells of a grid."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.attention = SelfAttention(width, num_heads)
        zero_init(self.attention.out)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # b xyz c
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


class _Position(nn.Module):
    """A learned vector a cell, added: shapes stand upright in their cube, and a convolution alone cannot tell where it is."""

    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(width, cells, cells, cells))

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return x + self.table.to(x.dtype)


class _Downsample(nn.Module):
    """Halve the resolution by a strided convolution, and say anew where each cell is."""

    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2, padding=1)
        self.position = _Position(width, cells)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.position(self.conv(x))


class _Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, width), width)


def _voxels_to_cells(voxels: Float[Tensor, "b voxels"], patch_size: int) -> Float[Tensor, "b c x y z"]:
    return morton_to_dense(patches(voxels, patch_size).transpose(1, 2).contiguous())


def _cells_to_voxels(cells: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b voxels"]:
    return unpatch(dense_to_morton(cells).transpose(1, 2))
