"""Layers that both denoisers share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sinusoidal_embedding(
    positions: Float[Tensor, " n"] | Int[Tensor, " n"], width: int, *, max_period: float
) -> Float[Tensor, "n width"]:
    """cos and sin of each position at width/2 frequencies from 1 down to 1/max_period (Vaswani et al. 2017), float32."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(width // 2, device=positions.device) / (width // 2))
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


PRIOR = "prior"
"""Where a VAE keeps p(z | y)."""

LABEL_ROWS = ("condition.label.weight", PRIOR)
"""How the keys of tables with a row a label end: a denoiser holds a ConditionEmbedding as `condition`."""


class ConditionEmbedding(nn.Module):
    """One vector a sample from its timestep and its label.

    The label table has one row more than there are classes: row `num_classes` is the null label of guidance.
    """

    def __init__(self, width: int, num_classes: int, *, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.time = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, t: Int[Tensor, " b"], label: Int[Tensor, " b"]) -> Float[Tensor, "b width"]:
        return self.time(sinusoidal_embedding(t, self.frequencies, max_period=10_000)) + self.label(label)


Rotation = tuple[Float[Tensor, "n half"], Float[Tensor, "n half"]]
"""cos and sin of the angles by which each token turns the pairs (i, i + half) of a head's channels."""


def rotate(x: Float[Tensor, "*batch n d"], rotation: Rotation) -> Float[Tensor, "*batch n d"]:
    """Turn each pair of channels by its token's angle (Su et al. 2021, eq. 34): q_m . k_n then depends on m - n alone.

    The tables are float32, so the product is too, whatever the dtype of x.
    """
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens, with queries and keys normalised (RMS, Henry et al. 2020) against drift.

    `rotation`, where given, turns queries and keys by their positions after they are normalised.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width={width} is not divisible by num_heads={num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_scale = nn.Parameter(torch.ones(width // num_heads))
        self.k_scale = nn.Parameter(torch.ones(width // num_heads))
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"], rotation: Rotation | None = None) -> Float[Tensor, "b n d"]:
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        # Normalised in the dtype of the activations: nn.RMSNorm with float32 weights falls off the fused path under autocast.
        q, k = (F.rms_norm(a, a.shape[-1:]) * scale.to(a.dtype) for a, scale in ((q, self.q_scale), (k, self.k_scale)))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        h = attention(q, k, v)
        return self.out(rearrange(h, "b heads n d -> b n (heads d)"))


MAX_EXPLICIT_SCORES = 2**22
"""As many as stay in the cache of a CPU, over all samples and heads."""

_pretends_gpu = False


def suits_cpu(x: Tensor) -> bool:
    """Whether to compute on `x` in the way that is fast on a CPU, where that is not the way of GPUs."""
    return x.device.type == "cpu" and not _pretends_gpu


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, CPU tensors are computed on as a GPU's would be: to count what that takes."""
    global _pretends_gpu
    before, _pretends_gpu = _pretends_gpu, True
    try:
        yield
    finally:
        _pretends_gpu = before


def attention(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads n d"], v: Float[Tensor, "b heads n d"]
) -> Float[Tensor, "b heads n d"]:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1).

    Fused, but for training on a CPU where the scores are few: its backward in bfloat16 takes up to six times as long there.
    """
    few = q[..., 0].numel() * q.shape[-2] <= MAX_EXPLICIT_SCORES and v.dtype == torch.bfloat16
    if few and suits_cpu(v) and torch.is_grad_enabled():
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def signals_of_cells(cells: Float[Tensor, "b n k"], out_channels: int) -> Float[Tensor, "b m"]:
    """`(b, (R/p)^3, out_channels p^3)` -> `(b, out_channels R^3)`: Morton-ordered signals, one after the other."""
    return rearrange(cells, "b n (o voxels) -> b (o n voxels)", o=out_channels)


def denoiser_inputs(batch_size: int, resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t, t, label) of the right shapes for a denoiser."""
    t, label = torch.zeros(2, batch_size, dtype=torch.long)
    return torch.empty(batch_size, resolution**3), t, label


def check_patch_size(patch_size: int) -> None:
    """Raise ValueError for a side of patches that Morton order does not have."""
    if patch_size < 1 or patch_size & (patch_size - 1):
        raise ValueError(f"patch_size={patch_size} must be a power of two: 1, 2, 4 ...")


def zero_init(layer: nn.Module) -> nn.Module:
    """Set weight and bias to 0, so that the branch that ends in `layer` starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """`block(*args)`; with `recompute` only its arguments are kept, and backward runs it again (Chen et al. 2016)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)
