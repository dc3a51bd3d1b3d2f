"""Which token comes next: distributions of several labels made one, tokens drawn from it, the fittest of several sequences."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapediff.methods.base import SampleConfig


def guided_terms(
    label: Int[Tensor, " b"] | Float[Tensor, "b labels"], *, scale: float, null_label: int
) -> tuple[Int[Tensor, "m b"], Float[Tensor, "m b"]]:
    """The labels that take part in each sample, and their weights, which sum to 1: see `product_of`.

    (1 - s) log p(.|null) + s sum_i w_i log p(.|i), the rule of `shapediff.diffusion.guidance` for log p in place of outputs. A
    label with weight 0 stands where a sample has fewer than the others.
    """
    weights = label if label.is_floating_point() else F.one_hot(label, null_label + 1).float()
    weights = scale * weights + (1 - scale) * F.one_hot(torch.tensor(null_label), null_label + 1).to(weights)
    num = int((weights != 0).sum(1).max())
    labels = weights.abs().argsort(dim=1, descending=True, stable=True)[:, :num]
    return labels.T, weights.gather(1, labels).T


def product_of(logits: Float[Tensor, "m b tokens"], weights: Float[Tensor, "m b"]) -> Float[Tensor, "b tokens"]:
    """log prod_j p_j^w_j, normalised: a product of experts (Hinton 2002); what is impossible (-inf) stays so.

    Weights that sum to 1 make it the geometric mean of classes, and, beyond [0, 1], classifier-free guidance.
    """
    impossible = logits[0].isinf()
    log_p = logits.log_softmax(-1).masked_fill(impossible, 0.0)
    return (weights[..., None] * log_p).sum(0).masked_fill(impossible, -math.inf).log_softmax(-1)


def choose(logits: Float[Tensor, "b tokens"], uniform: Float[Tensor, " b"], config: SampleConfig) -> Int[Tensor, " b"]:
    """A token a row, by the inverse of the distribution function at `uniform`.

    `temperature` divides the logits (0: the likeliest token); `top_k` keeps the k likeliest (0: all), `top_p` the likeliest that
    together reach that probability (Holtzman et al. 2020).
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.double() / config.temperature).softmax(-1).sort(-1, descending=True)
    rank = torch.arange(p.shape[-1])
    is_kept = (p.cumsum(-1) - p < config.top_p) & (rank < (config.top_k or p.shape[-1]))
    kept: Bool[Tensor, "b tokens"] = is_kept | (rank == 0)
    cumulative = (p * kept).cumsum(-1)
    at = (cumulative <= uniform.double()[:, None] * cumulative[:, -1:]).sum(-1)
    last = kept.sum(-1) - 1
    return order.gather(-1, torch.minimum(at, last)[:, None])[:, 0]


def fittest(log_weight: Float[Tensor, "b candidates"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One candidate a row, drawn in proportion to its weight: sampling-importance resampling (Rubin 1987).

    Of candidates drawn token by token from p restricted to what agrees with the kept voxels, each weighed by the product of the
    probabilities that it would have agreed anyway, the one drawn tends to p given these voxels as the candidates grow many.
    """
    cumulative = log_weight.double().softmax(-1).cumsum(-1)
    at = (cumulative <= uniform.double()[:, None] * cumulative[:, -1:]).sum(-1)
    return at.clamp(max=log_weight.shape[-1] - 1)
