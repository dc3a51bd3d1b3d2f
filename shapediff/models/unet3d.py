"""UNet3D: the convolutional denoiser (Ho et al. 2020; Dhariwal and Nichol 2021), on patches of voxels.

Shape suffixes: B batch, C channels, the rest X Y Z. The grid enters as Morton-ordered voxels; each p^3 patch becomes the
channels of one cell, so that a p = 2 UNet at 32^3 costs what a plain one costs at 16^3 and still decides every voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.grid.morton import dense_to_morton, morton_to_dense, patches
from shapediff.models.layers import (
    ConditionEmbedding,
    SelfAttention,
    denoiser_inputs,
    run_block,
    signals_of_cells,
    suits_cpu,
    zero_init,
)
from shapediff.models.norm import GroupNorm


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
        if not self.width_multipliers or min(self.width_multipliers) < 1 or self.num_res_blocks < 1:
            raise ValueError("width_multipliers and num_res_blocks must be positive")
        if self.width % 8 or self.width < 8:
            raise ValueError(f"width={self.width} must be a multiple of 8 (group normalisation)")
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
        step = self.patch_size * 2 ** (len(self.width_multipliers) - 1)
        if resolution % step or resolution < step:
            raise ValueError(
                f"resolution={resolution} is not divisible by patch_size * 2^(levels - 1) = {step}; "
                "use a smaller patch_size or fewer width_multipliers"
            )
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
        self.cells = _Cells(side, config.patch_size)
        self.conv_in = nn.Conv3d(channels, widths[0], 3, padding=1)
        self.position_in = _Position(widths[0], side)

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
                self.down.append(_down(width, side >> (level + 1), condition, config))
                skips.append(width)

        self.middle = nn.ModuleList(_Stage(width, width, condition, config, attends=i == 0) for i in range(2))

        self.up = nn.ModuleList()
        self.takes_skip: list[bool] = []  # one a module of `up`
        for level, level_width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                attends = level in config.attention_levels
                self.up.append(_Stage(width + skips.pop(), level_width, condition, config, attends=attends))
                width = level_width
            self.takes_skip += [True] * (config.num_res_blocks + 1) + [False] * (level > 0)
            if level:
                self.up.append(_up(width, condition, config))

        self.norm_out = _group_norm(width)
        self.conv_out = zero_init(nn.Conv3d(width, out_channels * channels, 3, padding=1))

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` of the right shapes."""
        return denoiser_inputs(batch_size, resolution)

    def forward(
        self, x_t: Float[Tensor, "b voxels"], t: Int[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b out_voxels"]:
        condition = F.silu(self.condition(t, label))
        h = self.position_in(_laid_out(self.conv_in(self.cells.split(x_t))))  # b c x y z from here on
        skips = [h]
        for stage in self.down:
            h = self._run(stage, h, condition)
            skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, condition)
        for stage, takes_skip in zip(self.up, self.takes_skip, strict=True):
            h = self._run(stage, torch.cat([h, skips.pop()], 1) if takes_skip else h, condition)
        return self.cells.join(self.conv_out(F.silu(self.norm_out(h))), self.out_channels)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed, in the order in which they run."""
        return [*self.down, *self.middle, *self.up]

    def _run(self, stage: nn.Module, h: Tensor, condition: Tensor) -> Tensor:
        return run_block(stage, h, condition, recompute=self.config.recompute_activations)


class _Stage(nn.Module):
    """A residual block with AdaGN (Dhariwal and Nichol 2021, sec. 3), then self-attention where asked.

    `resample` halves or doubles the resolution of both branches, after the first activation.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        condition: int,
        config: UNet3DConfig,
        *,
        attends: bool,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = _group_norm(width_in)
        self.conv_1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.scale_shift = nn.Linear(condition, 2 * width)
        self.norm_2 = _group_norm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = zero_init(nn.Conv3d(width, width, 3, padding=1))
        self.skip = nn.Identity() if width_in == width else nn.Conv3d(width_in, width, 1)
        self.attention = _GridAttention(width, config.num_heads) if attends else None

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b d x y z"]:
        h = F.silu(self.norm_1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_1(h)
        gain, offset = self.scale_shift(condition).chunk(2, 1)
        h = F.silu(self.norm_2(h, gain, offset))
        # The sum takes the memory format of its first term, and a 1x1x1 convolution may lose channels last.
        h = self.conv_2(self.dropout(h)) + self.skip(x)
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

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(width, side, side, side))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return x + self.table.to(x.dtype)


class _Downsample(nn.Module):
    """Halve the resolution by a strided convolution, and say anew where each cell is."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2, padding=1)
        self.position = _Position(width, side)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.position(self.conv(x))


class _DownBlock(nn.Module):
    """Halve the resolution inside a residual block, and say anew where each cell is."""

    def __init__(self, width: int, side: int, condition: int, config: UNet3DConfig) -> None:
        super().__init__()
        self.block = _Stage(width, width, condition, config, attends=False, resample=_halved)
        self.position = _Position(width, side)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.position(self.block(x, condition))


class _Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"]) -> Float[Tensor, "b c x2 y2 z2"]:
        return self.conv(_doubled(x))


def _down(width: int, side: int, condition: int, config: UNet3DConfig) -> nn.Module:
    return _DownBlock(width, side, condition, config) if config.resample_in_blocks else _Downsample(width, side)


def _up(width: int, condition: int, config: UNet3DConfig) -> nn.Module:
    if config.resample_in_blocks:
        return _Stage(width, width, condition, config, attends=False, resample=_doubled)
    return _Upsample(width)


def _halved(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x2 y2 z2"]:
    return _laid_out(F.avg_pool3d(x, 2))


def _doubled(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x2 y2 z2"]:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _laid_out(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
    """The memory format in which convolutions run fastest: channels last on a CPU, as PyTorch comes elsewhere."""
    return x.contiguous(memory_format=torch.channels_last_3d if suits_cpu(x) else torch.contiguous_format)


def _group_norm(width: int) -> GroupNorm:
    return GroupNorm(math.gcd(32, width), width)


class _Cells(nn.Module):
    """Morton-ordered voxels <-> a dense grid of cells, the voxels of a patch as the channels of its cell.

    The orders are buffers: torch.compile keeps a gather by them in its graph, where the cached tables of grid.morton break it.
    """

    code_of_cell: Int[Tensor, " cells"]
    cell_of_code: Int[Tensor, " cells"]

    def __init__(self, side: int, patch_size: int) -> None:
        super().__init__()
        self.side, self.patch_size = side, patch_size
        numbers = np.arange(side**3, dtype=np.int32)
        cell_of_code = dense_to_morton(numbers.reshape(side, side, side))
        self.register_buffer("code_of_cell", torch.from_numpy(morton_to_dense(numbers).ravel()), persistent=False)
        self.register_buffer("cell_of_code", torch.from_numpy(cell_of_code), persistent=False)

    def split(self, voxels: Float[Tensor, "b voxels"]) -> Float[Tensor, "b c x y z"]:
        """(b, R^3) -> (b, p^3, R/p, R/p, R/p)."""
        cells = torch.index_select(patches(voxels, self.patch_size), 1, self.code_of_cell)
        return _laid_out(cells.unflatten(1, (self.side,) * 3).movedim(-1, 1))

    def join(self, cells: Float[Tensor, "b c x y z"], out_channels: int) -> Float[Tensor, "b out_voxels"]:
        """(b, out_channels p^3, R/p, R/p, R/p) -> (b, out_channels R^3)."""
        in_order = torch.index_select(cells.movedim(1, -1).flatten(1, 3), 1, self.cell_of_code)
        return signals_of_cells(in_order, out_channels)
