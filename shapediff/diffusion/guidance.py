"""Classifier-free guidance (Ho and Salimans 2022), in an interval of noise levels, rescaled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapediff.diffusion.schedule import NoiseSchedule

Denoise = Callable[[Float[Tensor, "b ..."], Int[Tensor, " b"]], Float[Tensor, "b ..."]]
"""A denoiser with its labels bound: (x_t, t) -> output like x_t, with twice the channels where it learns the variance."""

Denoiser = Callable[[Float[Tensor, "b ..."], Int[Tensor, " b"], Int[Tensor, " b"]], Float[Tensor, "b ..."]]
"""A denoiser: (x_t, t, label) -> output like x_t, with twice the channels where it learns the variance."""


@dataclass(frozen=True)
class Guidance:
    """How strongly, where and how the label guides.

    `scale` 1 is the conditional denoiser, 0 the unconditional one, more than 1 exaggerates the label.
    `interval` (low, high): guidance acts where low <= sqrt(1 - abar) <= high; elsewhere the denoiser is conditional, for half
    the cost (Kynkaanniemi et al. 2024, who give the interval in sigma: sqrt(1 - abar) = sigma / sqrt(1 + sigma^2)).
    `rescale` is phi in [0, 1] of Lin et al. 2024, eq. 16: how far the standard deviation of the guided output goes back to
    that of the conditional one.
    `split_batch` runs the two forwards one after the other, in half the memory.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    split_batch: bool = False

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= self.scale < float("inf"):
            raise ValueError(f"guidance_scale={self.scale} must be a number, 0 or more")
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"guidance_interval=({low}, {high}) needs 0 <= low < high <= 1, noise levels sqrt(1 - abar)"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale} must lie in [0, 1]")

    def acts(self, t: Int[Tensor, " b"], *, schedule: NoiseSchedule) -> Bool[Tensor, " b"]:
        """Whether each timestep lies in the interval."""
        low, high = self.interval
        level = schedule.noise_level(t)
        return (low <= level) & (level <= high)


def guided(
    denoiser: Denoiser,
    label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
    *,
    null_label: int,
    guidance: Guidance,
    schedule: NoiseSchedule,
) -> Denoise:
    """Bind labels and guidance: out = out_unc + scale * (out_cond - out_unc), on every channel of x_t.

    One forward where scale is 0 or 1 or guidance does not act, else two. The formula holds for epsilon, x0 and v alike, since
    each is an affine function of the others at fixed x_t and the two weights add up to one. Rescaling is not alike: as
    published, it acts on the output itself, whatever that predicts. Channels beyond those of x_t say the learned variance,
    which no one can exaggerate: they stay as the conditional ones (as in DiT, Peebles and Xie 2023).
    A label may be a row of weights over all labels that sum to 1: out_cond is then their mean, as in `mixed`.
    """
    if label.ndim == 2:
        denoiser = mixed(denoiser, torch.cat([label, _one_hot(null_label, label)]))
        label, null_label = torch.arange(len(label), device=label.device), len(label)
    null = torch.full_like(label, null_label)

    def everywhere(x_t: Tensor, t: Tensor) -> Tensor:
        if guidance.scale in (0, 1):
            return denoiser(x_t, t, label if guidance.scale == 1 else null)
        conditional, unconditional = _both(denoiser, x_t, t, label, null, split_batch=guidance.split_batch)
        num_channels = x_t.shape[1]
        unconditional, _ = _split(unconditional, num_channels)
        conditional, variance = _split(conditional, num_channels)
        out = torch.lerp(unconditional, conditional, guidance.scale)
        out = rescaled(out, conditional, phi=guidance.rescale) if guidance.rescale else out
        return out if variance is None else torch.cat([out, variance], 1)

    def in_interval(x_t: Tensor, t: Tensor) -> Tensor:
        acts = guidance.acts(t, schedule=schedule)
        if bool(acts.all()):
            return everywhere(x_t, t)
        conditional = denoiser(x_t, t, label)
        if not bool(acts.any()):
            return conditional
        return torch.where(acts.reshape(-1, *[1] * (x_t.ndim - 1)), everywhere(x_t, t), conditional)

    # Asking where it acts waits for the GPU: only those pay for it who limit it.
    return everywhere if guidance.interval == (0, 1) or guidance.scale == 1 else in_interval


def mixed(denoiser: Denoiser, weights: Float[Tensor, "rows labels"]) -> Denoiser:
    """A denoiser whose label l is row l of `weights`: sum_i weights[l, i] denoiser(x_t, t, i), over the weights that are not 0.

    With weights that sum to 1 guidance gives out_unc + s sum_i w_i (out_i - out_unc), the product of the classes, each to the
    power of its weight (Liu et al. 2022, "Compositional Visual Generation", eq. 11). All forwards are made in one batch.
    """

    def denoise(x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        rows = weights[label]
        sample, each = rows.nonzero(as_tuple=True)
        out = denoiser(x_t[sample], t[sample], each)
        weighted = rows[sample, each].to(out.dtype).reshape(-1, *[1] * (out.ndim - 1)) * out
        # Sums of consecutive rows: unlike index_add, in the same order every time on a GPU too.
        return torch.segment_reduce(weighted.float(), "sum", lengths=(rows != 0).sum(1), unsafe=True)

    return denoise


def _one_hot(label: int, like: Float[Tensor, "b labels"]) -> Float[Tensor, "1 labels"]:
    return torch.nn.functional.one_hot(torch.tensor([label], device=like.device), like.shape[1]).to(like.dtype)


def rescaled(out: Float[Tensor, "b ..."], conditional: Float[Tensor, "b ..."], *, phi: float) -> Float[Tensor, "b ..."]:
    """phi out std(conditional) / std(out) + (1 - phi) out, std over each whole sample (Lin et al. 2024, eq. 15 and 16)."""
    every = tuple(range(1, out.ndim))
    std, std_conditional = (x.std(every, correction=0, keepdim=True) for x in (out, conditional))
    return torch.lerp(out, out * torch.where(std > 0, std_conditional / std, 1.0), phi)


def _split(output: Tensor, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """The prediction, and what the output says beyond it."""
    if output.shape[1] == num_channels:
        return output, None
    return output[:, :num_channels], output[:, num_channels:]


def _both(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, label: Tensor, null: Tensor, *, split_batch: bool
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """The conditional and the unconditional output, in one batch of 2b or in two of b."""
    if split_batch:
        return denoiser(x_t, t, label), denoiser(x_t, t, null)
    conditional, unconditional = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([label, null])).chunk(2)
    return conditional, unconditional
