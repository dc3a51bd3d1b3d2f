"""Classifier-free guidance (Ho and Salimans 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Denoise = Callable[[Float[Tensor, "b ..."], Int[Tensor, " b"]], Float[Tensor, "b ..."]]
"""A denoiser with its labels bound: (x_t, t) -> output like x_t."""

Denoiser = Callable[[Float[Tensor, "b ..."], Int[Tensor, " b"], Int[Tensor, " b"]], Float[Tensor, "b ..."]]
"""A denoiser: (x_t, t, label) -> output like x_t."""


def guided(denoiser: Denoiser, label: Int[Tensor, " b"], *, null_label: int, scale: float) -> Denoise:
    """Bind labels and guidance: out = out_unc + scale * (out_cond - out_unc), on every channel.

    scale 1 is the conditional and scale 0 the unconditional denoiser, each at the cost of one forward; any other scale
    runs both in one batch of 2b. The formula holds for epsilon, x0 and v alike, since each is an affine function of the
    others at fixed x_t and the two weights add up to one.
    """
    null = torch.full_like(label, null_label)
    if scale in (0, 1):
        only = label if scale == 1 else null
        return lambda x_t, t: denoiser(x_t, t, only)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, null]))
        conditional, unconditional = both.chunk(2)
        return torch.lerp(unconditional, conditional, scale)

    return denoise
