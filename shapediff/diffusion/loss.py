"""The denoising loss and its weighting over timesteps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import Prediction, per_sample_mean
from shapediff.diffusion.schedule import NoiseSchedule

Weighting = Literal["uniform", "min_snr", "snr_plus_one"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

VLB_WEIGHT = 0.001
"""lambda in L_hybrid = L_simple + lambda L_vlb, the loss of a learned variance (Nichol and Dhariwal 2021, eq. 16)."""


def squared_error(output: Float[Tensor, "b ..."], target: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The mean squared error of each sample, float32 whatever the dtype of the output."""
    return per_sample_mean((output.float() - target.float()).square())


def loss_weight(
    t: Int[Tensor, " b"],
    *,
    schedule: NoiseSchedule,
    prediction: Prediction,
    weighting: Weighting,
    gamma: float = 5.0,
) -> Float[Tensor, " b"]:
    """The weight of each sample's squared error, float32.

    "uniform": 1, the simple loss of Ho et al. 2020, eq. 14. "min_snr": the error of x_0 weighted by min(SNR, gamma)
    (Hang et al. 2023, eq. 8), which is min(SNR, gamma) / SNR on eps and min(SNR, gamma) / (SNR + 1) on v. "snr_plus_one": the
    error of x_0 weighted by min(SNR + 1, gamma), that of v where SNR + 1 < gamma (Salimans and Ho 2022, sec. 4).
    """
    if weighting == "uniform":
        return torch.ones(len(t), device=t.device)
    snr = schedule.snr(t)
    per_unit_of_x0 = {"epsilon": snr, "x0": torch.ones_like(snr), "v": snr + 1}[prediction]
    of_x0 = snr if weighting == "min_snr" else snr + 1
    return (of_x0.clamp(max=gamma) / per_unit_of_x0).float()


def check_class_dropout(rate: float) -> None:
    """Raise ValueError where it is no probability."""
    if not 0 <= rate <= 1:
        raise ValueError(f"class_dropout={rate} must lie in [0, 1]")


def drop_labels(
    label: Int[Tensor, " b"], uniform: Float[Tensor, " b"], *, null_label: int, rate: float
) -> Int[Tensor, " b"]:
    """Replace the label by the null label where `uniform` < rate, sample by sample (Ho and Salimans 2022, alg. 1)."""
    return torch.where(uniform < rate, torch.full_like(label, null_label), label)
