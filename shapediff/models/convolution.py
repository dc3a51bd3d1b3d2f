"""What convolutional networks over grids of cells are made of: residual blocks, resampling, positions, Morton order in and out.

Shape suffixes: B batch, C channels, the rest X Y Z.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.grid.morton import dense_to_morton, morton_to_dense, patches
from shapediff.models.layers import SelfAttention, check_patch_size, signals_of_cells, suits_cpu, zero_init
from shapediff.models.norm import GroupNorm, may_lie_beside
from shapediff.models.packed import PackedConv3d, PackedConvTranspose3d


def check_width(width: int) -> None:
    """Raise ValueError for a width whose channels cannot be normalised in groups."""
    if width % 8 or width < 8:
        raise ValueError(f"width={width} must be a multiple of 8 (group normalisation)")


def check_levels(width: int, width_multipliers: tuple[int, ...], patch_size: int) -> None:
    """Raise ValueError for levels that no network could have, at any resolution."""
    if not width_multipliers or min(width_multipliers) < 1:
        raise ValueError(f"width_multipliers={width_multipliers} must be positive, one a level")
    check_width(width)
    check_patch_size(patch_size)


def coarsest_side(resolution: int, *, patch_size: int, num_levels: int) -> int:
    """Cells a side of the last level, each at half the resolution of the one before. Raises ValueError where there are none."""
    step = patch_size << (num_levels - 1)
    if resolution % step or resolution < step:
        raise ValueError(
            f"resolution={resolution} is not divisible by patch_size * 2^(levels - 1) = {step}; "
            "use a smaller patch_size or fewer width_multipliers"
        )
    return resolution // step


class Stage(nn.Module):
    """A residual block (Dhariwal and Nichol 2021, sec. 3), then self-attention where asked.

    With `condition`, the width of a vector a sample, that vector scales and shifts what the second norm gives (AdaGN).
    `num_heads` 0 is no attention. `resample` halves or doubles the resolution of both branches, after the first activation.
    The last `width_beside` of the channels come in a tensor of their own: those of a UNet's skip connection.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        condition: int = 0,
        *,
        num_heads: int = 0,
        dropout: float = 0.0,
        resample: Callable[[Tensor], Tensor] | None = None,
        width_beside: int = 0,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm_1 = group_norm(width_in)
        self.conv_1 = nn.Conv3d(width_in, width, 3, padding=1)
        self.scale_shift = nn.Linear(condition, 2 * width) if condition else None
        self.norm_2 = group_norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zero_init(nn.Conv3d(width, width, 3, padding=1))
        is_plain = width_in == width and not width_beside
        self.skip = nn.Identity() if is_plain else ConvOfParts((width_in - width_beside, width_beside), width)
        self.attention = GridAttention(width, num_heads) if num_heads else None

    def forward(
        self,
        x: Float[Tensor, "b c x y z"],
        condition: Float[Tensor, "b k"] | None = None,
        beside: Float[Tensor, "b e x y z"] | None = None,
    ) -> Float[Tensor, "b d x y z"]:
        if beside is not None and not may_lie_beside(x, beside):
            x, beside = torch.cat([x, beside], 1), None
        h = self.norm_1(x, beside=beside, silu=True)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_1(h)
        scale_shift = () if self.scale_shift is None else self.scale_shift(condition).chunk(2, 1)
        h = self.norm_2(h, *scale_shift, silu=True)
        h = self._summed(self.dropout(h), self.skip(x) if beside is None else self.skip(x, beside))
        return h if self.attention is None else self.attention(h)

    def _summed(self, h: Tensor, term: Tensor) -> Tensor:
        if isinstance(self.conv_2, PackedConv3d) and term.dtype == torch.bfloat16:
            return self.conv_2(h, laid_out(term), in_place=not isinstance(self.skip, nn.Identity))
        # The sum takes the memory format of its first term, and a 1x1x1 convolution may lose channels last.
        return with_gradient_laid_out(self.conv_2(h) + term)


class ConvOfParts(nn.Conv3d):
    """A 1x1x1 convolution of channels that lie in two tensors, or in one: a sum, for which no tensor of both is needed."""

    def __init__(self, widths: tuple[int, int], width: int) -> None:
        super().__init__(sum(widths), width, 1)
        self.widths = widths

    def forward(
        self, x: Float[Tensor, "b c x y z"], beside: Float[Tensor, "b e x y z"] | None = None
    ) -> Float[Tensor, "b d x y z"]:
        if beside is None:
            return super().forward(x)
        first, second = self.weight.split(self.widths, 1)
        return F.conv3d(x, first, self.bias) + F.conv3d(beside, second)


class PackedConvOfParts(nn.Module):
    """A `ConvOfParts` whose weights no longer change."""

    def __init__(self, conv: ConvOfParts) -> None:
        super().__init__()
        self.widths = conv.widths
        first, second = conv.weight.split(conv.widths, 1)
        self._first = PackedConv3d(first, conv.bias)
        self._second = PackedConv3d(second) if conv.widths[1] else None

    def forward(
        self, x: Float[Tensor, "b c x y z"], beside: Float[Tensor, "b e x y z"] | None = None
    ) -> Float[Tensor, "b d x y z"]:
        if self._second is None:
            return self._first(x)
        if beside is None:
            x, beside = (laid_out(part) for part in x.split(self.widths, 1))
        return self._second(beside, self._first(x), in_place=True)


class GridAttention(nn.Module):
    """Residual self-attention over the cells of a grid."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.attention = SelfAttention(width, num_heads)
        zero_init(self.attention.out)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # b xyz c
        return x + self.attention(tokens).transpose(1, 2).reshape(x.shape)


POSITION_TABLE = ".table"
"""How the keys of learned positions end."""


class Position(nn.Module):
    """A learned vector a cell, added: shapes stand upright in their cube, and a convolution alone cannot tell where it is."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(width, side, side, side))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
        return x + laid_out(self.table.to(x.dtype)[None])


class Downsample(nn.Module):
    """Halve the resolution by a strided convolution, and say anew where each cell is."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width, width, 3, stride=2, padding=1)
        self.position = Position(width, side)

    def forward(
        self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c x2 y2 z2"]:
        return with_gradient_laid_out(self.position(self.conv(x)))


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = ConvOfDoubled(width, width)

    def forward(
        self, x: Float[Tensor, "b c x y z"], condition: Float[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b c x2 y2 z2"]:
        return with_gradient_laid_out(self.conv(x))


CELLS_A_CHANNEL = {torch.bfloat16: 32, torch.float32: 2, torch.float64: 2}
"""From how many on transposed convolutions of a CPU are faster, in each dtype: their weights are larger."""


class ConvOfDoubled(nn.Conv3d):
    """A convolution of x at twice its resolution by nearest neighbours: Conv3d(c, d, 3, padding=1) of `doubled(x)`.

    A voxel sees two of x along each axis, under three weights of which two add up: 8 products in place of 27. That is a
    transposed convolution with kernels of 4^3 (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?").
    """

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x2 y2 z2"]:
        # Whatever the batch is: samples do not depend on how they are spread over processes.
        if not suits_cpu(x) or x.shape[2:].numel() < CELLS_A_CHANNEL.get(x.dtype, math.inf) * x.shape[1]:
            return super().forward(doubled(x))
        return F.conv_transpose3d(x, _kernel_of_doubled(self.weight).to(x.dtype), self.bias, stride=2, padding=1)


PACKED_CELLS_A_CHANNEL = 4
"""The same where weights are summed once."""


class PackedConvOfDoubled(nn.Module):
    """A `ConvOfDoubled` whose weights no longer change."""

    def __init__(self, conv: ConvOfDoubled) -> None:
        super().__init__()
        self._transposed = PackedConvTranspose3d(_kernel_of_doubled(conv.weight), conv.bias, stride=2, padding=1)
        self._plain = PackedConv3d(conv.weight, conv.bias, padding=1)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x2 y2 z2"]:
        is_large = x.shape[2:].numel() >= PACKED_CELLS_A_CHANNEL * x.shape[1]
        return self._transposed(x) if is_large else self._plain(doubled(x))


def packed(conv: nn.Conv3d) -> nn.Module:
    """What `conv` computes in bfloat16, in less time: see `packed.py`."""
    if isinstance(conv, ConvOfDoubled):
        return PackedConvOfDoubled(conv)
    if isinstance(conv, ConvOfParts):
        return PackedConvOfParts(conv)
    assert (
        conv.groups == 1
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and set(conv.dilation) == {1}
    )
    return PackedConv3d(conv.weight, conv.bias, stride=conv.stride[0], padding=conv.padding[0])


def _kernel_of_doubled(weight: Float[Tensor, "d c 3 3 3"]) -> Float[Tensor, "c d 4 4 4"]:
    with torch.autocast(weight.device.type, enabled=False):  # sums of weights before they are rounded
        kernel = weight.flatten(2) @ _spread(weight.device).to(weight.dtype)
    return kernel.unflatten(2, (4, 4, 4)).transpose(0, 1)


def _spread(device: torch.device) -> Float[Tensor, "27 64"]:
    """To which of 4^3 places each of 3^3 weights is added: k to 2 - k and 3 - k, along each axis."""
    axis = torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], device=device)
    return torch.kron(torch.kron(axis, axis), axis)


def halved(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x2 y2 z2"]:
    return laid_out(F.avg_pool3d(x, 2))


def doubled(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x2 y2 z2"]:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def laid_out(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
    """The memory format in which convolutions run fastest: channels last on a CPU, as PyTorch comes elsewhere."""
    return x.contiguous(memory_format=torch.channels_last_3d if suits_cpu(x) else torch.contiguous_format)


def with_gradient_laid_out(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c x y z"]:
    """`x`, whose gradient will be laid out, too: that of a part of a concatenation is not, and convolutions would pay for it."""
    if x.requires_grad and suits_cpu(x) and not torch.compiler.is_compiling():
        x.register_hook(laid_out)
    return x


def group_norm(width: int) -> GroupNorm:
    return GroupNorm(math.gcd(32, width), width)


class Cells(nn.Module):
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
        return self.placed(patches(voxels, self.patch_size))

    def placed(self, cells: Float[Tensor, "b cells c"]) -> Float[Tensor, "b c x y z"]:
        """Cells in Morton order as a dense grid."""
        cells = torch.index_select(cells, 1, self.code_of_cell)
        return laid_out(cells.unflatten(1, (self.side,) * 3).movedim(-1, 1))

    def join(self, cells: Float[Tensor, "b c x y z"], out_channels: int) -> Float[Tensor, "b out_voxels"]:
        """(b, out_channels p^3, R/p, R/p, R/p) -> (b, out_channels R^3)."""
        in_order = torch.index_select(cells.movedim(1, -1).flatten(1, 3), 1, self.cell_of_code)
        return signals_of_cells(in_order, out_channels)
