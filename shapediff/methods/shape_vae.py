"""ShapeVAE: a variational autoencoder of shapes (Kingma and Welling 2014), whose latents can be sampled, blended and diffused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shapediff.diffusion.editing import Edit
from shapediff.diffusion.loss import check_class_dropout, drop_labels
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ConfigError
from shapediff.methods.base import Batch, LossOutput, Method, MethodConfig, SampleConfig
from shapediff.models import ModelConfig, VAE3DConfig
from shapediff.models.vae3d import VAE3D, Gaussian

SMOOTH_L1_BETA = 0.1
"""Errors below it count squared. The gradient of plain L1 never shrinks: after 8,000 shapes IoU was 0.83, with this 0.85."""


@dataclass(frozen=True)
class ShapeVAEConfig(MethodConfig):
    """Reconstruction + kl_weight KL(q(z|x) || p(z|y)) / R^3, y replaced by the null label with probability `class_dropout`.

    A `kl_weight` of 1 is the negative ELBO a voxel where the reconstruction is a log-likelihood; for latents to diffuse it is
    small, so that shapes come back.
    """

    kl_weight: float = 1e-3
    class_dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight < float("inf"):
            raise ValueError(f"kl_weight={self.kl_weight} must be 0 or more; 0 is a plain autoencoder")
        check_class_dropout(self.class_dropout)

    def build(self, *, resolution: int, num_classes: int) -> ShapeVAE:
        return ShapeVAE(self, resolution=resolution, num_classes=num_classes)


class ShapeVAE(Method):
    """One network, "vae"."""

    num_timesteps = 1
    has_autoencoder = True
    sampling_settings = frozenset()
    """Nothing of sampling can be chosen: latents are drawn and decoded."""

    def __init__(self, config: ShapeVAEConfig, *, resolution: int, num_classes: int) -> None:
        self.config = config
        self.resolution = resolution
        self.num_classes = num_classes

    def build_networks(self, model: ModelConfig) -> dict[str, nn.Module]:
        if not isinstance(model, VAE3DConfig):
            raise ConfigError("method=shape_vae trains model=vae3d; other models are denoisers or read tokens")
        return {"vae": model.build(resolution=self.resolution, num_classes=self.num_classes)}

    def loss(self, networks: Mapping[str, nn.Module], batch: Batch, seeds: Sequence[int]) -> LossOutput:
        """`error` is that of the reconstruction alone; the metrics have KL in nats a shape, and the IoU of what comes back."""
        x, noise = batch["voxels"], NoiseSource(seeds, batch["voxels"].device)
        rate = self.config.class_dropout
        label = drop_labels(batch["label"], noise.uniform(), null_label=self.num_classes, rate=rate)
        eps = noise.normal(self._num_latents(networks))
        decoded, posterior, prior = networks["vae"](x, eps, label)
        error = reconstruction_error(decoded.float(), x)
        kl = kl_divergence(posterior, prior)
        per_sample = error + self.config.kl_weight * kl / self.resolution**3
        with torch.no_grad():
            iou = occupancy_iou(decoded, x)
        return LossOutput(
            loss=per_sample.mean(),
            per_sample=per_sample.detach(),
            error=error.detach(),
            t=torch.zeros_like(label),
            label=batch["label"],
            metrics={"kl": kl.detach(), "reconstruction_iou": iou},
        )

    def sample(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        seeds: Sequence[int],
        *,
        config: SampleConfig,
        edit: Edit | None = None,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b voxels"]:
        """Draws of p(z | label), decoded; `edit` may give the latents, or turn the draws from seed to seed."""
        edit = edit or Edit()
        if edit.x_0 is not None or edit.mirror is not None:
            raise ConfigError(
                "method=shape_vae can interpolate, but not complete, vary or mirror; use method=voxel_diffusion"
            )
        vae = vae_in(networks)
        z = edit.x_T
        if z is None:
            z = vae.prior_of(label).draw(edit.noise(seeds, label.device).normal(self._num_latents(networks)))
        signal = signal_of(vae.decode(z))
        if on_step is not None:
            on_step(1, 1)
        return signal

    def reconstruct(
        self, networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]
    ) -> Float[Tensor, "b voxels"]:
        """The decoded mean of q(z | x)."""
        return reconstruction(networks, voxels)

    def invert(
        self,
        networks: Mapping[str, nn.Module],
        label: Int[Tensor, " b"] | Float[Tensor, "b labels"],
        voxels: Float[Tensor, "b voxels"],
        *,
        config: SampleConfig,
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "b latents"]:
        """The mean of q(z | x)."""
        return vae_in(networks).encode(voxels).mean

    def _num_latents(self, networks: Mapping[str, nn.Module]) -> int:
        return vae_in(networks).config.latent_resolution(self.resolution) ** 3


def vae_in(networks: Mapping[str, nn.Module]) -> VAE3D:
    """The autoencoder itself, also where an engine that trains it is around it."""
    network = networks["vae"]
    return cast(VAE3D, getattr(network, "module", network))


def reconstruction(networks: Mapping[str, nn.Module], voxels: Float[Tensor, "b voxels"]) -> Float[Tensor, "b voxels"]:
    """The decoded mean of q(z | x)."""
    vae = vae_in(networks)
    return signal_of(vae.decode(vae.encode(voxels).mean))


def occupancy_iou(a: Float[Tensor, "b voxels"], b: Float[Tensor, "b voxels"]) -> Float[Tensor, " b"]:
    """The IoU of what is above 0 in each; 0 where neither has anything."""
    return ((a > 0) & (b > 0)).sum(1) / ((a > 0) | (b > 0)).sum(1).clamp(min=1)


def kl_divergence(q: Gaussian, p: Gaussian) -> Float[Tensor, " b"]:
    """KL(q || p) = 1/2 sum (log s_p^2 - log s_q^2 + (s_q^2 + (m_q - m_p)^2) / s_p^2 - 1), in nats."""
    difference = p.log_variance - q.log_variance
    distance = (q.mean - p.mean).square() / p.log_variance.exp()
    return 0.5 * (difference + (-difference).exp() + distance - 1).sum(1)


def reconstruction_error(logits: Float[Tensor, "b voxels"], x: Float[Tensor, "b voxels"]) -> Float[Tensor, " b"]:
    """How badly `signal_of(logits)` is x: of occupancies, which are -1 or 1, cross-entropy plus Dice; of a TSDF, smooth L1.

    Cross-entropy is in nats a voxel, Dice 1 - 2 sum(p x) / sum(p + x) with probabilities p and occupancies x (Milletari et al.
    2016). Smooth L1 of an error e is e^2 / 2b up to b = `SMOOTH_L1_BETA` and |e| - b / 2 beyond (Girshick 2015): its mean within
    the band plus that outside it, which may hold nearly all voxels.
    """
    occupied, in_band = (x + 1) / 2, (x.abs() < 1).float()
    p = logits.sigmoid()
    dice = 1 - (2 * (p * occupied).sum(1) + 1) / ((p + occupied).sum(1) + 1)
    of_occupancy = F.binary_cross_entropy_with_logits(logits, occupied, reduction="none").mean(1) + dice
    error = F.smooth_l1_loss(signal_of(logits), x, reduction="none", beta=SMOOTH_L1_BETA)
    inside, outside = ((error * part).sum(1) / part.sum(1).clamp(min=1) for part in (in_band, 1 - in_band))
    return torch.where(in_band.any(1), inside + outside, of_occupancy)


def signal_of(logits: Float[Tensor, "b voxels"]) -> Float[Tensor, "b voxels"]:
    """The signal in [-1, 1] of the decoder's logits: tanh(l / 2), which is 2 p - 1 for the probability p = sigmoid(l)."""
    return (logits / 2).tanh()
