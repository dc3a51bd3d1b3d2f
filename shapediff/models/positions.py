"""Where a token is: tables over the cells of a cubic grid, in Morton order."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shapediff.grid.morton import morton_decode
from shapediff.models.layers import Rotation, sinusoidal_embedding

ROPE_BASE = 100.0
"""Wavelengths go from 2 pi to nearly 2 pi times this, in tokens: 100 suits the sides of grids (Heo et al. 2024), 10,000 texts."""


def position_table(cells_per_side: int, width: int) -> Float[Tensor, "tokens width"]:
    """3D sine-cosine positions: a third of `width` for each of x, y and z; the channels that are left over are 0."""
    axes = [sinusoidal_embedding(axis, width // 6 * 2, max_period=10_000) for axis in _coords(cells_per_side).T]
    return F.pad(torch.cat(axes, 1), (0, width % 6))


def rotary_table(cells_per_side: int, head_width: int) -> Rotation:
    """3D axial rotary positions (Su et al. 2021; Heo et al. 2024): a third of a head's channels turns with each of x, y and z.

    The last `head_width % 6` channels do not turn. The first w^3 rows serve every window of side w: only offsets count.
    """
    num = head_width // 6
    frequencies = ROPE_BASE ** (-torch.arange(num, device="cpu") / num)
    angles = (_coords(cells_per_side)[:, :, None] * frequencies).flatten(1)  # tokens, 3 num
    angles = F.pad(angles, (0, head_width // 2 - 3 * num))
    return angles.cos(), angles.sin()


def _coords(cells_per_side: int) -> Float[Tensor, "tokens 3"]:
    # From NumPy, and so real even where a network is built on the meta device.
    return torch.from_numpy(morton_decode(np.arange(cells_per_side**3))).float()
