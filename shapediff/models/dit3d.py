"""DiT3D: the transformer denoiser (Peebles and Xie 2023; DiT-3D, Mo et al. 2023).

A token is one p^3 patch, and in Morton order the patches are a view of the voxels: no transpose, no gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.grid.morton import patches, windows
from shapediff.models.convolution import Cells, Stage, check_width, group_norm
from shapediff.models.layers import (
    ConditionEmbedding,
    Rotation,
    SelfAttention,
    check_patch_size,
    denoiser_inputs,
    run_block,
    signals_of_cells,
    zero_init,
)
from shapediff.models.positions import position_table, rotary_table

Positions = Literal["sincos", "rope"]

_CELL = 2
"""Voxels a side of the cells that `refine_width` convolves."""


@dataclass(frozen=True)
class DiT3DConfig:
    """Sizes of a DiT3D; the defaults are DiT-S with patches of 4 (Mo et al. 2023).

    `positions` are added to the tokens as sines and cosines, or turn queries and keys (rotary, axial in 3D).
    `window_size` 0 lets every block attend to all tokens; else blocks attend within windows of that many tokens a side,
    but for every `global_every`-th one, and where one window holds the whole grid it is the same.
    `bottleneck` 0 maps a patch straight to hidden_size and back; else through that many channels, both ways: for large
    patches, where x_0 is predicted (Li and He 2025); eps and v need every one of a patch's p^3 dimensions.
    `refine_width` 0 ends in the tokens; else convolutions of that width join them to x_t, which a token is too narrow to carry.
    `recompute_activations` keeps the inputs of blocks alone for backward: less memory, a third more time.
    """

    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    patch_size: int = 4
    mlp_ratio: float = 4.0
    positions: Positions = "sincos"
    window_size: int = 0
    global_every: int = 4
    bottleneck: int = 0
    refine_width: int = 0
    recompute_activations: bool = False

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.depth, self.num_heads, self.global_every) < 1 or self.bottleneck < 0:
            raise ValueError("hidden_size, depth, num_heads and global_every must be positive, bottleneck not negative")
        check_patch_size(self.patch_size)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions {self.positions!r} is unknown; use one of {', '.join(get_args(Positions))}")
        if self.positions == "rope" and (self.head_width % 2 or self.head_width < 6):
            raise ValueError(
                f"positions=rope turns pairs of channels on three axes: {self.head_width} a head is odd or below 6"
            )
        if self.window_size < 0 or self.window_size & (self.window_size - 1):
            raise ValueError(f"window_size={self.window_size} must be a power of two, or 0 for none")
        if self.refine_width:
            check_width(self.refine_width)
            if self.patch_size < _CELL:
                raise ValueError(
                    f"refine_width joins cells of {_CELL}^3 voxels: patch_size={self.patch_size} is smaller"
                )

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_heads

    def window_of(self, block: int) -> int:
        """Tokens a side that block number `block` attends within; 0: all of them."""
        return 0 if (block + 1) % self.global_every == 0 else self.window_size

    def num_tokens(self, resolution: int) -> int:
        """The patches of a grid of `resolution` voxels a side."""
        return (resolution // self.patch_size) ** 3

    def build(self, *, resolution: int, num_classes: int, out_channels: int = 1) -> DiT3D:
        """The network, for grids of `resolution` voxels a side. Raises ValueError where patches do not fill them."""
        if resolution % self.patch_size:
            raise ValueError(f"resolution={resolution} is not divisible by patch_size={self.patch_size}")
        return DiT3D(self, resolution=resolution, num_classes=num_classes, out_channels=out_channels)


class DiT3D(nn.Module):
    """The denoiser `net(x_t, t, label) -> like x_t` on Morton-ordered voxels (b, R^3); out (b, out_channels R^3)."""

    positions: Float[Tensor, "tokens d"]
    cos: Float[Tensor, "tokens half"]
    sin: Float[Tensor, "tokens half"]

    def __init__(self, config: DiT3DConfig, *, resolution: int, num_classes: int, out_channels: int = 1) -> None:
        super().__init__()
        self.config = config
        self.out_channels = out_channels
        width, channels, side = config.hidden_size, config.patch_size**3, resolution // config.patch_size
        self.condition = ConditionEmbedding(width, num_classes)
        self.patch_in = _patch_in(channels, config)
        self._register_positions(side)
        self.blocks = nn.ModuleList(_Block(config, config.window_of(i)) for i in range(config.depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.scale_shift_out = zero_init(nn.Linear(width, 2 * width))
        if config.refine_width:
            self.refiner = _Refiner(config, resolution // _CELL, out_channels)
        else:
            self.patch_out = _patch_out(out_channels * channels, config)

    def example_inputs(self, batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of `forward` of the right shapes."""
        return denoiser_inputs(batch_size, resolution)

    def forward(
        self, x_t: Float[Tensor, "b voxels"], t: Int[Tensor, " b"], label: Int[Tensor, " b"]
    ) -> Float[Tensor, "b out_voxels"]:
        condition = F.silu(self.condition(t, label))
        h, rotation = self._place(self.patch_in(patches(x_t, self.config.patch_size)))  # b tokens d
        for block in self.blocks:
            h = run_block(block, h, condition, rotation, recompute=self.config.recompute_activations)
        scale, shift = self.scale_shift_out(condition)[:, None].chunk(2, -1)
        h = self.norm_out(h) * (1 + scale) + shift
        if self.config.refine_width:
            return self.refiner(h, x_t, condition)
        return signals_of_cells(self.patch_out(h), self.out_channels)

    def _register_positions(self, side: int) -> None:
        if self.config.positions == "sincos":
            self.register_buffer("positions", position_table(side, self.config.hidden_size), persistent=False)
        else:
            cos, sin = rotary_table(side, self.config.head_width)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def _place(self, h: Float[Tensor, "b tokens d"]) -> tuple[Float[Tensor, "b tokens d"], Rotation | None]:
        """The tokens with what is added for their positions, and what turns their queries and keys."""
        if self.config.positions == "sincos":
            return h + self.positions, None
        # Under autocast h is bfloat16 here; what the blocks add up must stay in the tables' float32, as above.
        return h.to(self.cos.dtype), (self.cos, self.sin)


class _Block(nn.Module):
    """Attention and MLP under adaLN-Zero (Peebles and Xie 2023, sec. 3.2): each starts as the identity.

    With a `window_size`, attention stays within cubes of that many tokens a side; 0: among all tokens.
    """

    def __init__(self, config: DiT3DConfig, window_size: int) -> None:
        super().__init__()
        self.window_size = window_size
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(width, config.num_heads)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = zero_init(nn.Linear(width, 6 * width))

    def forward(
        self, x: Float[Tensor, "b n d"], condition: Float[Tensor, "b d"], rotation: Rotation | None = None
    ) -> Float[Tensor, "b n d"]:
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate_1 * self._attend(self.norm_1(x) * (1 + scale_1) + shift_1, rotation)
        return x + gate_2 * self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2)

    def _attend(self, x: Float[Tensor, "b n d"], rotation: Rotation | None) -> Float[Tensor, "b n d"]:
        tokens = self.window_size**3
        if not 0 < tokens < x.shape[1]:
            return self.attention(x, rotation)
        if rotation is not None:
            rotation = rotation[0][:tokens], rotation[1][:tokens]
        # b n d -> (b n/w^3) w^3 d: in Morton order a window is a run of tokens, and this is a view.
        return self.attention(windows(x, self.window_size).flatten(0, 1), rotation).reshape(x.shape)


class _Refiner(nn.Module):
    """Tokens and x_t to the output, by convolutions over cells of 2^3 voxels.

    Noise of p^3 dimensions does not go through a token, and borders between patches show; a last convolution heals these (Bao et
    al. 2023, sec. 3.1), and with x_t beside the tokens what is local need not go through them (Hoogeboom et al. 2023, sec. 2.3).
    """

    def __init__(self, config: DiT3DConfig, side: int, out_channels: int) -> None:
        super().__init__()
        width, self.out_channels = config.refine_width, out_channels
        self.cells = Cells(side, _CELL)
        # A token is a run of cells in Morton order, so its part of them is a view.
        self.from_token = nn.Linear(config.hidden_size, (config.patch_size // _CELL) ** 3 * width)
        self.conv_in = nn.Conv3d(_CELL**3, width, 3, padding=1)
        self.stage = Stage(width, width, config.hidden_size)
        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv3d(width, out_channels * _CELL**3, 3, padding=1))

    def forward(
        self, tokens: Float[Tensor, "b n d"], x_t: Float[Tensor, "b voxels"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b out_voxels"]:
        h = self.cells.placed(self.from_token(tokens).unflatten(2, (-1, self.conv_in.out_channels)).flatten(1, 2))
        h = self.stage(h + self.conv_in(self.cells.split(x_t)), condition)
        return self.cells.join(self.conv_out(self.norm_out(h, silu=True)), self.out_channels)


def _patch_in(channels: int, config: DiT3DConfig) -> nn.Module:
    if not config.bottleneck:
        return nn.Linear(channels, config.hidden_size)
    narrow = nn.Linear(channels, config.bottleneck, bias=False)
    return nn.Sequential(narrow, nn.Linear(config.bottleneck, config.hidden_size))


def _patch_out(channels: int, config: DiT3DConfig) -> nn.Module:
    """From hidden_size to the voxels of a patch, zero at the start."""
    if not config.bottleneck:
        return zero_init(nn.Linear(config.hidden_size, channels))
    narrow = nn.Linear(config.hidden_size, config.bottleneck, bias=False)
    return nn.Sequential(narrow, zero_init(nn.Linear(config.bottleneck, channels)))
