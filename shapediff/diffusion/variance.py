"""Learned variances of the reverse process (Nichol and Dhariwal 2021, sec. 3.1 and 3.4).

The denoiser has twice the channels: first its prediction, then what gives `fraction`, their v (here v is a prediction):

    Sigma = exp(fraction log beta + (1 - fraction) log beta~),   fraction = (out + 1) / 2                   (eq. 15)

beta and beta~ are those of the step that is made, t to t_prev, so that a respaced chain needs nothing more.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from shapediff.diffusion.gaussian import column
from shapediff.diffusion.schedule import NoiseSchedule

Variance = Literal["fixed", "learned"]
VARIANCES: tuple[str, ...] = get_args(Variance)


def split_output(output: Float[Tensor, "b ..."]) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """The prediction, and the fraction on the way from log beta~ (0) to log beta (1): both halves of the channels.

    Nothing keeps the fraction within [0, 1], as in the paper. A network that starts at 0 starts half way.
    """
    prediction, out = output.chunk(2, 1)
    return prediction, (out + 1) / 2


def log_variance_gap(
    t: Int[Tensor, " b"], t_prev: Int[Tensor, " b"], *, schedule: NoiseSchedule
) -> Float64[Tensor, " b"]:
    """log beta - log beta~ = log((1 - abar) / (1 - abar')), above 0; infinite at t_prev = -1, where beta~ is 0."""
    return (schedule.noise_level(t).log() - schedule.noise_level(t_prev).log()) * 2


def log_variance(
    fraction: Float[Tensor, "b ..."], t: Int[Tensor, " b"], t_prev: Int[Tensor, " b"], *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """log Sigma of the step from t to t_prev >= 0 (eq. 15 on the respaced chain)."""
    log_beta = torch.log1p(-schedule.abar(t) / schedule.abar(t_prev))
    gap = log_variance_gap(t, t_prev, schedule=schedule)
    return column(log_beta, fraction) - (1 - fraction) * column(gap, fraction)


def log_variance_of_x0(
    fraction: Float[Tensor, "b ..."], t: Int[Tensor, " b"], t_next: Int[Tensor, " b"], *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """log Sigma of the last step, from t to clean data: between beta = 1 - abar and beta~ of the step before, t_next to t.

    Its own beta~ is 0, so the one above takes its place (Nichol and Dhariwal 2021, as in their code).
    """
    log_beta = torch.log1p(-schedule.abar(t))
    low = log_variance(torch.zeros_like(log_beta), t_next, t, schedule=schedule)
    return column(low, fraction) + fraction * column(log_beta - low, fraction)
