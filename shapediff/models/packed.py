"""Convolutions whose weights no longer change, for sampling in bfloat16 on a CPU.

Weights lie in the order in which oneDNN reads them, else it sorts them at every call; and a residual sum is formed where the
products are, else it goes through memory once more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@lru_cache
def packs() -> bool:
    """Whether this PyTorch on this CPU has what is needed: operations that its compiler uses, and that are not documented."""
    with torch.inference_mode():
        x = torch.ones(1, 8, 2, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
        try:
            if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            summed = PackedConv3d(torch.ones(8, 8, 1, 1, 1))(
                x, x.clone(memory_format=torch.preserve_format), in_place=True
            )
            doubled = PackedConvTranspose3d(torch.ones(8, 8, 4, 4, 4), torch.zeros(8), stride=2, padding=1)(x)
        except (AttributeError, RuntimeError, TypeError):
            return False
    return summed.shape == x.shape and doubled.shape[2:] == (4, 4, 4)


class PackedConv3d(nn.Module):
    """A convolution of x with channels last; weights, x and what comes out are rounded to bfloat16."""

    def __init__(
        self,
        weight: Float[Tensor, "d c kx ky kz"],
        bias: Float[Tensor, " d"] | None = None,
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self._sizes = [padding] * 3, [stride] * 3, [1] * 3, 1
        self._weight = torch._C._nn.mkldnn_reorder_conv3d_weight(_rounded(weight).to_mkldnn(), *self._sizes)
        self._bias = None if bias is None else _rounded(bias)

    def forward(
        self,
        x: Float[Tensor, "b c x y z"],
        term: Float[Tensor, "b d x2 y2 z2"] | None = None,
        *,
        in_place: bool = False,
    ) -> Float[Tensor, "b d x2 y2 z2"]:
        """With `term`, bfloat16 with channels last, their sum; `in_place` in its memory."""
        x, weights = x.bfloat16(), (self._weight, self._bias, *self._sizes)
        if term is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *weights, "none", [], "")
        adds: tuple[Any, ...] = ("add", None, None, [], "")
        if in_place:
            return torch.ops.mkldnn._convolution_pointwise_.binary(term, x, *weights, *adds)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, term, *weights, *adds)


class PackedConvTranspose3d(nn.Module):
    """A transposed convolution, likewise."""

    def __init__(
        self, weight: Float[Tensor, "c d kx ky kz"], bias: Float[Tensor, " d"] | None, *, stride: int, padding: int
    ) -> None:
        super().__init__()
        self._sizes = [padding] * 3, [0] * 3, [stride] * 3, [1] * 3, 1
        self._weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(_rounded(weight), *self._sizes)
        self._bias = None if bias is None else _rounded(bias)

    def forward(self, x: Float[Tensor, "b c x y z"]) -> Float[Tensor, "b d x2 y2 z2"]:
        weights = self._weight, self._bias, *self._sizes
        return torch.ops.mkldnn._convolution_transpose_pointwise(x.bfloat16(), *weights, "none", [], "")


def _rounded(parameter: Tensor) -> Tensor:
    return parameter.detach().bfloat16().contiguous()
