"""DiT3D: the transformer denoiser (Peebles and Xie 2023; DiT-3D, Mo et al. 2023).

A token is one p^3 patch, and in Morton order the patches are a view of the voxels: no transpose, no gather.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.grid.morton import morton_decode, patches, unpatch
from shapediff.models.layers import ConditionEmbedding, SelfAttention, sinusoidal_embedding, zero_init


@dataclass(frozen=True)
class DiT3DConfig:
    """Sizes of a DiT3D; the defaults are DiT-S with patches of 4 (Mo et al. 2023)."""

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 4
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.hidden_size % 6:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of 6 (sine and cosine on three axes)")

    def build(self, *, resolution: int, num_classes: int) -> DiT3D:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where patches do not fill them."""
        if resolution % self.patch_size:
            raise ValueError(f"resolution={resolution} is not divisible by patch_size={self.patch_size}")
        return DiT3D(self, resolution=resolution, num_classes=num_classes)


class DiT3D(nn.Module):
    """The denoiser `net(x_t, t, label) -> like x_t` on Morton-ordered voxels (b, R^3)."""

    positions: Float[Tensor, "tokens d"]

    def __init__(self, config: DiT3DConfig, *, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.config = config
        width, channels = config.hidden_size, config.patch_size**3
        self.condition = ConditionEmbedding(width, num_classes)
        self.patch_in = nn.Linear(channels, width)
        self.register_buffer("positions", position_table(resolution // config.patch_size, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_out = zero_init(nn.Linear(width, 2 * width))
        self.patch_out = zero_init(nn.Linear(width, channels))

    def forward(
        self, x_t: Float[Tensor, "b voxels"], t: Int[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b voxels"]:
        condition = F.silu(self.condition(t, label))
        h = self.patch_in(patches(x_t, self.config.patch_size)) + self.positions  # b tokens d
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.scale_shift_out(condition)[:, None].chunk(2, -1)
        return unpatch(self.patch_out(self.norm_out(h) * (1 + scale) + shift))  # b tokens p^3 -> b voxels


class _Block(nn.Module):
    """Attention and MLP under adaLN-Zero (Peebles and Xie 2023, sec. 3.2): each starts as the identity."""

    def __init__(self, config: DiT3DConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(self, x: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"]) -> Float[Tensor, "b n d"]:
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate_1 * self.attention(self.norm_1(x) * (1 + scale_1) + shift_1)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)


def position_table(cells_per_side: int, width: int) -> Float[Tensor, "tokens width"]:
    """3D sine-cosine positions of the patches in Morton order: a third of `width` for each of x, y and z."""
    coords = torch.from_numpy(morton_decode(np.arange(cells_per_side**3)))
    return torch.cat([sinusoidal_embedding(axis, width // 3, max_period=10_000) for axis in coords.T], 1)
