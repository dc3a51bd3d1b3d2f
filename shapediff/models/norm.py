"""Group normalisation, and SiLU after it, for activations with channels last on a CPU: PyTorch's own backward is slow there.

Compiled loops, two passes each way, where PyTorch's threads are those of an OpenMP library; its operations elsewhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shapediff.models import openmp
from shapediff.models.layers import suits_cpu

FEW_CELLS = 1024
"""Below, PyTorch sums 16-bit numbers with channels last some four times slower than it turns them into 32 bits and sums those."""


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu and He 2018), then `gain` and `offset` a sample and channel if given (AdaGN), then SiLU if asked.

        y = ((x - mean) / sqrt(var + eps) * weight + bias) * (1 + gain) + offset

    with the mean and variance of each sample and group (Dhariwal and Nichol 2021, sec. 3, for the second pair).
    """

    def forward(
        self,
        x: Float[Tensor, "b d x y z"],
        gain: Float[Tensor, "b c"] | None = None,
        offset: Float[Tensor, "b c"] | None = None,
        *,
        beside: Float[Tensor, "b e x y z"] | None = None,
        silu: bool = False,
    ) -> Float[Tensor, "b c x y z"]:
        """With `beside`, of which `may_lie_beside` x holds, the channels are those of x and then those."""
        if _is_channels_last_on_cpu(x):
            weight, bias = self.weight[None], self.bias[None]
            if gain is not None and offset is not None:
                weight, bias = weight * (1 + gain), bias * (1 + gain) + offset
            if _suits_loops(x):
                return _InLoops.apply(x, beside, self.num_groups, weight, bias, self.eps, silu)
            y = _GroupNorm.apply(x, self.num_groups, weight, bias, self.eps)
        else:
            y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            if gain is not None and offset is not None:
                y = y * (1 + gain)[:, :, None, None, None] + offset[:, :, None, None, None]
        return F.silu(y) if silu else y


def may_lie_beside(x: Tensor, other: Tensor) -> bool:
    """Whether channels of both are normalised together where they lie; else they have to be concatenated."""
    fit = (x.dtype, x.shape[0], x.shape[2:]) == (other.dtype, other.shape[0], other.shape[2:])
    return fit and all(_is_channels_last_on_cpu(part) and _suits_loops(part) for part in (x, other))


def _is_channels_last_on_cpu(x: Tensor) -> bool:
    return suits_cpu(x) and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def _suits_loops(x: Tensor) -> bool:
    # Whatever the number of threads: samples are the same to the last bit on any.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return (type(x) in (Tensor, nn.Parameter) or _is_fake(x)) and openmp.parallel() is not None


def _is_fake(x: Tensor) -> bool:
    return hasattr(x, "fake_mode")


class _InLoops(torch.autograd.Function):
    """y = x_hat * weight + bias, with weight and bias (b or 1, c), then SiLU if asked; x_hat of x and of what is beside it.

    Of fake tensors it gives the shapes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beside: Tensor | None,
        num_groups: int,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        silu: bool,
    ) -> Tensor:
        num_channels = x.shape[1] + (0 if beside is None else beside.shape[1])
        y = x.new_empty(x.shape[0], *x.shape[2:], num_channels).movedim(-1, 1)
        statistics = None
        if not _is_fake(x):
            from shapediff.models import norm_kernels

            statistics = norm_kernels.forward(x, beside, y, num_groups, _row(weight), _row(bias), eps, silu=silu)
        ctx.save_for_backward(x, beside, weight, bias, statistics)
        ctx.num_groups, ctx.silu = num_groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor, Tensor, None, None]:
        from shapediff.models import norm_kernels

        x, beside, weight, bias, statistics = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d).to(x.dtype)
        out = torch.empty_like(x), None if beside is None else torch.empty_like(beside)
        gradients = norm_kernels.backward(
            x, beside, dy, out, ctx.num_groups, _row(weight), _row(bias), statistics, silu=ctx.silu
        )
        d_weight, d_bias = (value.sum_to_size(weight.shape).to(weight.dtype) for value in gradients)
        return *out, None, d_weight, d_bias, None, None


def _row(value: Float[Tensor, "b_or_1 c"]) -> Float[Tensor, "b_or_1 c"]:
    return value.float().contiguous()


class _GroupNorm(torch.autograd.Function):
    """y = x_hat * weight + bias, with weight and bias (b or 1, c), by sums over cells and products a channel alone.

    With w = weight / sd and sums over the M numbers of a group, dx = w dy - (sum(w dy) + x_hat sum(w dy x_hat) / weight) / M.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        b, c, num_cells = x.shape[0], x.shape[1], x[0, 0].numel()
        shared = len(weight) == 1
        # In float32 whatever x is, else mean and rstd would come rounded to bfloat16.
        affine = (weight[0], bias[0]) if shared else (torch.ones_like(weight[0]), torch.zeros_like(bias[0]))
        values = x.float() if x.itemsize == 2 and num_cells < FEW_CELLS else x
        y, mean, rstd = torch.native_group_norm(values, *affine, b, c, num_cells, num_groups, eps)
        y = y.to(x.dtype)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y if shared else torch.addcmul(_per_channel(bias, x), y, _per_channel(weight, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        x, mean, rstd, weight = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last_3d)
        sum_dy, sum_dy_x = _sum_of_cells(dy), _sum_of_cells(dy * x)
        group_size = x.shape[1] // mean.shape[1]
        mean, rstd = (value.to(sum_dy.dtype).repeat_interleave(group_size, 1) for value in (mean, rstd))
        sum_dy_x_hat = (sum_dy_x - mean * sum_dy) * rstd
        count = group_size * x[0, 0].numel()
        slope = rstd.square() * _mean_of_group(weight * sum_dy_x_hat, group_size, count)
        level = rstd * _mean_of_group(weight * sum_dy, group_size, count) - mean * slope
        dx = torch.addcmul(_per_channel(-level, x), x, _per_channel(-slope, x))
        dx.addcmul_(dy, _per_channel(weight * rstd, x))
        return dx, None, _like(sum_dy_x_hat, weight), _like(sum_dy, weight), None


def _sum_of_cells(x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b c"]:
    """In parts, each rounded to the dtype of x: a sum in float32 alone would copy the whole of x first."""
    cells = x.permute(0, 2, 3, 4, 1).flatten(1, 3)  # b xyz c, a view
    parts = cells.unflatten(1, (math.gcd(64, cells.shape[1]), -1)).sum(2)
    return parts.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))


def _mean_of_group(value: Float[Tensor, "b c"], group_size: int, count: int) -> Float[Tensor, "b c"]:
    """The sum over the channels of each group over `count`, at each of its channels."""
    return (value.unflatten(1, (-1, group_size)).sum(2) / count).repeat_interleave(group_size, 1)


def _per_channel(value: Float[Tensor, "b c"], x: Tensor) -> Float[Tensor, "b c 1 1 1"]:
    return value.to(x.dtype)[:, :, None, None, None]


def _like(value: Float[Tensor, "b c"], parameter: Float[Tensor, "b_or_1 c"]) -> Float[Tensor, "b_or_1 c"]:
    return value.sum_to_size(parameter.shape).to(parameter.dtype)
