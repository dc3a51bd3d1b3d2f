"""The denoisers as they were when exports of format version 1 began (commit 6d2d56e), kept whole: today's must equal them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from shapediff.grid.morton import dense_to_morton, morton_decode, morton_to_dense, patches, unpatch


def sinusoidal_embedding(positions: Tensor, width: int, *, max_period: float) -> Tensor:
    frequencies = torch.exp(-math.log(max_period) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ConditionEmbedding(nn.Module):
    def __init__(self, width: int, num_classes: int, *, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Tensor, label: Tensor) -> Tensor:
        return self.time(sinusoidal_embedding(t, self.frequencies, max_period=10_000)) + self.label(label)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_scale = nn.Parameter(torch.ones(width // num_heads))
        self.k_scale = nn.Parameter(torch.ones(width // num_heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        q, k = (F.rms_norm(a, a.shape[-1:]) * scale.to(a.dtype) for a, scale in ((q, self.q_scale), (k, self.k_scale)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(h, "b heads n d -> b n (heads d)"))


def zero_init(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@dataclass(frozen=True)
class DiT3DConfig:
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 4
    mlp_ratio: float = 4.0

    def build(self, *, resolution: int, num_classes: int) -> DiT3D:
        return DiT3D(self, resolution=resolution, num_classes=num_classes)


class DiT3D(nn.Module):
    positions: Tensor

    def __init__(self, config: DiT3DConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.patch_size**3
        self.condition = ConditionEmbedding(width, num_classes)
        self.patch_in = nn.Linear(channels, width)
        self.register_buffer("positions", position_table(resolution // config.patch_size, width), persistent=False)
        self.blocks = nn.ModuleList(_DiTBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_out = zero_init(nn.Linear(width, 2 * width))
        self.patch_out = zero_init(nn.Linear(width, channels))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        condition = F.silu(self.condition(t, label))
        h = self.patch_in(patches(x_t, self.config.patch_size)) + self.positions  # b tokens d
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.scale_shift_out(condition)[:, None].chunk(2, -1)
        return unpatch(self.patch_out(self.norm_out(h) * (1 + scale) + shift))  # b tokens p^3 -> b voxels


class _DiTBlock(nn.Module):
    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


def position_table(cells_per_side: int, width: int) -> Tensor:
    coords = torch.from_numpy(morton_decode(np.arange(cells_per_side**3)))
    return torch.cat([sinusoidal_embedding(axis, width // 3, max_period=10_000) for axis in coords.T], 1)


@dataclass(frozen=True)
class UNet3DConfig:
    width: int = 64
    width_multipliers: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (2,)
    num_heads: int = 4
    patch_size: int = 2
    dropout: float = 0.0

    def build(self, *, resolution: int, num_classes: int) -> UNet3D:
        return UNet3D(self, resolution=resolution, num_classes=num_classes)


class UNet3D(nn.Module):
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

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
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

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.scale_shift(condition)[:, :, None, None, None].chunk(2, 1)
        h = self.norm_2(h) * (1 + scale) + shift
        h = self.skip(x) + self.conv_2(self.dropout(F.silu(h)))
        return h if self.attention is None else self.attention(h)


class _GridAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.attention = SelfAttention(width, num_heads)
        zero_init(self.attention.out)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # b xyz c
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


class _Position(nn.Module):
    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(width, cells, cells, cells))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.to(x.dtype)


class _Downsample(nn.Module):
    def __init__(self, width: int, cells: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2, padding=1)
        self.position = _Position(width, cells)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.position(self.conv(x))


class _Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, width), width)


def _voxels_to_cells(voxels: Tensor, patch_size: int) -> Tensor:
    return morton_to_dense(patches(voxels, patch_size).transpose(1, 2).contiguous())


def _cells_to_voxels(cells: Tensor) -> Tensor:
    return unpatch(dense_to_morton(cells).transpose(1, 2))
